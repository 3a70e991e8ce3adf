"""Progress bars on a terminal's standard error; elsewhere a line a minute."""

from __future__ import annotations

import time
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tiedconv.calibration import Fitted, Fitting, Joint
from tiedconv.cli.common import err, shown
from tiedconv.cli.render import accuracy, counted, duration, other_size, preparation, size
from tiedconv.conversion.calibrate import (
    CandidateChosen,
    CandidateStarted,
    DrawnText,
    Measuring,
    ResumedFits,
)
from tiedconv.conversion.calibrate import Event as CalibrationEvent
from tiedconv.loggers import memory_in_use
from tiedconv.training import (
    METRIC_TITLES,
    Baseline,
    Checkpointed,
    ClassesMatched,
    Detecting,
    EpochEnd,
    EvalStep,
    Event,
    ImagesPrepared,
    KeptBest,
    Metrics,
    NotCompiled,
    RateFound,
    Resumed,
    Skipped,
    Start,
    Step,
    TeacherScore,
    Unlabelled,
    primary,
    rank_in_environment,
)
from tiedconv.utils.stage import Stage

LINE_SECONDS = 60.0
"""Time between two lines where no bar is drawn."""

BLOCKS = 0.5
"""Share of a calibration that the fits of blocks are counted as; the rest is the whole model."""


class Bar:
    """One bar with a note beside it.

    Args:
        what: is done.
        columns: between that and the note; a bar, counts and the time left if none are given.
    """

    def __init__(self, what: str, *columns: ProgressColumn) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            *(columns or (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
            # Of several processes only the first shows progress.
            disable=not err.is_terminal or rank_in_environment() > 0,
        )
        self._task: TaskID = self._progress.add_task(what, total=None, note="")
        self._logged = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: float, total: float, note: str = "", what: str | None = None) -> None:
        """Move the bar."""
        self._progress.update(
            self._task, completed=done, total=total, note=note, description=what
        )  # fmt: skip

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(shown(text)), soft_wrap=True)

    def log_line(self, text: str) -> None:
        """At most one line a minute where no bar is drawn, as in the log of a batch job."""
        if err.is_terminal or rank_in_environment() > 0:
            return
        if time.monotonic() - self._logged >= LINE_SECONDS:
            self._logged = time.monotonic()
            self.line(text)


class ConvertBar(Bar):
    """A bar for the whole of a conversion: its stages, and how far the present one is.

    Args:
        batch_size: images in a step of a calibration.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__(
            "open", BarColumn(bar_width=_bar_width()), TaskProgressColumn(), TimeRemainingColumn()
        )
        self._batch_size = batch_size
        self._stage = Stage("open", 0, 0)
        self._speed = _Speed()

    def stage(self, stage: Stage) -> None:
        """A stage starts, or a part of one."""
        if stage.name != self._stage.name:
            self._progress.reset(self._task, total=None)
        self._stage = stage
        self._show(0, 1, "")

    def groups(self, done: int, total: int) -> None:
        """Groups fitted."""
        self._show(done, total, f"{done:,} of {counted(total, 'group')}")

    def sites(self, done: int, total: int) -> None:
        """Shapes of layers timed."""
        self.update(done / max(total, 1), 1.0, f"{done} of {counted(total, 'layer shape')}", "time")

    def rehearsal(self, number: int) -> None:
        """A model of the plan is timed."""
        self.update(1.0, 1.0, f"model {number} of such a plan", "time")

    def __call__(self, event: CalibrationEvent) -> None:
        match event:
            case Measuring(images, total):
                speed = self._speed.of("measuring", images)
                self._show(0, 1, f"{images:,} of {counted(total, 'image')} measured{speed}")
            case Fitting(units, index, count, number, step, steps, error):
                speed = self._speed.of((number, index), step * self._batch_size)
                turn = f"pass {number + 1}, " if number else ""
                note = f"{turn}{_span(units)}: step {step}/{steps}{speed}  error {error:.3f}"
                self._show(BLOCKS * (index + step / max(steps, 1)) / count, 1, note)
            case Fitted(units, index, count, _, before, after):
                self._show(BLOCKS * (index + 1) / count, 1, "")
                self.line(f"{_span(units)}: relative error {before:.3f} -> {after:.3f}")
            case Joint(step, steps, loss):
                speed = self._speed.of("whole model", step * self._batch_size)
                done = BLOCKS + (1 - BLOCKS) * step / max(steps, 1)
                self._show(done, 1, f"whole model: step {step}/{steps}{speed}  loss {loss:.4f}")
            case DrawnText():
                self.line("The model reads text too: random token ids are drawn for each image")
            case ResumedFits(count):
                self.line(f"resumed with {counted(count, 'saved fit')}")
            case CandidateStarted(number, count, schemes):
                self.line(f"fit {number} of {count} ({', '.join(schemes)}), block by block:")
            case CandidateChosen(number, divergences):
                nats = ", ".join(f"{each:.3g}" for each in divergences)
                self.line(f"kept fit {number}: KL divergence of each {nats} nats")

    def _show(self, done: float, total: float, note: str) -> None:
        """So much of the present part of the stage is done."""
        stage = self._stage
        what, parts = f"{stage.number}/{stage.count} {stage.name}", max(stage.parts, 1)
        if parts > 1:
            note = f"plan {stage.part} of {parts}  {note}"
        share = (max(stage.part - 1, 0) + done / max(total, 1)) / parts
        self.update(share, 1.0, note, what)
        self.log_line(f"stage {what} {100 * share:.0f} %  {note}")


class _Speed:
    """Images in a second, from counts that start again with each piece of work."""

    def __init__(self) -> None:
        self._what: object = None
        self._since, self._start = 0.0, 0

    def of(self, what: object, images: int) -> str:
        """The speed as a note; empty at the start of a piece."""
        now = time.monotonic()
        if what != self._what or images < self._start:
            self._what, self._since, self._start = what, now, images
        seconds = now - self._since
        return f"  {(images - self._start) / seconds:,.0f} images/s" if seconds > 0.5 else ""


def _span(units: tuple[str, ...]) -> str:
    """A short name for the modules that are fitted together."""
    names = [name or "the whole model" for name in units]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


class PlanBar(Bar):
    """A bar for a comparison of schemes."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self._fits = (0, 0, "")

    def fit(self, done: int, total: int, what: str) -> None:
        """Fits done, and the next one."""
        self._fits = (done, total, what)
        self.update(done, total, what)

    def __call__(self, event: CalibrationEvent) -> None:
        if isinstance(event, Measuring):
            done, total, what = self._fits
            self.update(done, total, f"{what}: image {event.images:,} of {event.total:,}")


class SensitivityBar(Bar):
    """A bar for a sensitivity analysis: statistics of the images, then measured divergences."""

    def __call__(self, event: CalibrationEvent) -> None:
        if isinstance(event, Measuring):
            self.update(event.images, event.total, "images", "statistics")

    def measured(self, done: int, total: int) -> None:
        """Images run through the model with each matrix replaced."""
        self.update(done, total, "images", "measuring")


class TrainingBar(Bar):
    """A bar that listens to training and evaluation."""

    def __init__(self, what: str = "training") -> None:
        # Training reports the time left; the bar's estimate is upset by evaluations in between.
        super().__init__(what, BarColumn(bar_width=_bar_width()), MofNCompleteColumn())
        self._total = self._epochs = 0
        self._prepared: list[str] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Start(steps, epochs, images):
                self._total, self._epochs = steps, epochs
                for text in filter(None, self._prepared):  # once nothing is refused any more
                    self.line(text)
                done, times = counted(steps, "step"), counted(epochs, "epoch")
                self.line(f"{done}, {times} of {counted(images, 'image')}")
            case Resumed(epoch, step):
                self.line(f"resumed after epoch {epoch}, step {step:,}")
            case Baseline(metrics):
                self.line(f"before: {_score(metrics)}")
            case TeacherScore(metrics):
                self.line(f"teacher: {_score(metrics)}")
            case Step(epoch, step, _, lr, speed, left):
                used = memory_in_use()
                note = self._fitting(
                    step, self._total, f"epoch {epoch}/{self._epochs}", f"loss {event.loss:.3f}",
                    f"{duration(left)} left", f"{speed:,.0f} images/s", f"lr {lr:.1e}",
                    *([size(used)] if used is not None else []),
                )  # fmt: skip
                self.update(step, self._total, note, "training")
                self.log_line(f"step {step:,}/{self._total:,}  {note}")
            case EvalStep(images, total, speed):
                left = (total - images) / max(speed, 1e-9)
                note = f"{speed:,.0f} images/s  {duration(left)} left"
                self.update(images, total, note, "evaluating")
                self.log_line(f"evaluating {images:,}/{total:,} images  {note}")
            case EpochEnd(epoch, loss, metrics, seconds):
                score = f", {_score(metrics)}" if metrics else ""
                self.line(f"epoch {epoch}: loss {loss:.3f}{score}, {seconds:.0f} s")
            case Skipped(count, example):
                what = "image that can't be read:" if count == 1 else "images that can't be read,"
                self.line(f"skipped {count} {what} {'' if count == 1 else 'such as '}{example}")
            case ImagesPrepared(prepared, native):
                side = 224 if prepared is None else int(prepared["size"])
                self._prepared = [preparation(prepared), other_size(native, side)]
            case ClassesMatched(how, classes, odd):
                if how in ("name", "class map"):
                    self.line(f"{classes:,} classes are matched to the model's by {how}")
                elif odd:
                    self.line(
                        f"folder names are numbers, sorted as text: {odd} is not label {odd}. "
                        "--class-map FILE changes that"
                    )
            case Unlabelled(images):
                self.line(f"{images:,} images have no labels: measuring agreement with the teacher")
            case Detecting(images, objects):
                self.line(f"{objects:,} objects in {images:,} images: measuring average precision")
            case NotCompiled(reason):
                self.line(f"not compiled: {reason}")
            case RateFound(lr, _, _):
                self.line(f"peak learning rate {lr:g}, found by one step of several lengths")
            case KeptBest(step, steps, start, loss):
                where = "at the start" if step == 0 else f"after step {step:,} of {steps:,}"
                self.line(f"lowest loss on held-out images {where}: {start:.4g} -> {loss:.4g}")
            case Checkpointed():
                pass

    def _fitting(self, done: int, total: int, *parts: str) -> str:
        """A note of as many parts, the first of them, as there is room for."""
        room = err.width - _bar_width() - len(f"training   {done}/{total} ")
        while len(parts) > 1 and len("  ".join(parts)) > room:
            parts = parts[:-1]
        return "  ".join(parts)


def _score(metrics: Metrics) -> str:
    """The primary metric, with its name."""
    return f"{METRIC_TITLES[next(iter(metrics))]} {accuracy(primary(metrics))}"


def _bar_width() -> int:
    return 20 if err.width >= 100 else 8
