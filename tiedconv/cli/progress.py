"""Progress bars on standard error; nothing is drawn where nobody looks."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from tiedconv.calibrate import Measuring
from tiedconv.calibration import CalibEvent, Fitted, Fitting, Joint
from tiedconv.cli.common import err
from tiedconv.cli.render import accuracy
from tiedconv.training import (
    Baseline,
    Checkpointed,
    EpochEnd,
    EvalStep,
    Event,
    NotCompiled,
    Resumed,
    Skipped,
    Start,
    Step,
    Unlabelled,
)


class Bar:
    """One bar with a note beside it."""

    def __init__(self, what: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task: TaskID = self._progress.add_task(what, total=None, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def update(self, done: float, total: float, note: str = "", what: str | None = None) -> None:
        """Move the bar."""
        self._progress.update(
            self._task, completed=done, total=total, note=note, description=what
        )  # fmt: skip

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(Text(text), soft_wrap=True)


class ConvertBar(Bar):
    """A bar that listens to a conversion."""

    def groups(self, done: int, total: int) -> None:
        """Groups fitted."""
        self.update(done, total, "", "fitting")

    def __call__(self, event: CalibEvent | Measuring) -> None:
        match event:
            case Measuring(images, total):
                self.update(images, total, "images", "measuring")
            case Fitting(units, index, count, number, step, steps, error):
                note = f"step {step}/{steps}  error {error:.3f}  {_span(units)}"
                what = "blocks" if number == 0 else f"blocks, pass {number + 1}"
                self.update(index, count, note, what)
            case Fitted(units, index, count, _, before, after):
                self.update(index + 1, count, "", "blocks")
                self.line(f"{_span(units)}: relative error {before:.3f} -> {after:.3f}")
            case Joint(step, steps, loss):
                self.update(step, steps, f"loss {loss:.4f}", "whole model")


def _span(units: tuple[str, ...]) -> str:
    """Modules that are fitted together, in few words."""
    names = [name or "the whole model" for name in units]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


class TrainingBar(Bar):
    """A bar that listens to training and evaluation."""

    def __init__(self, what: str = "training") -> None:
        super().__init__(what)
        self._total = 0
        self._figure = "top-1"

    def __call__(self, event: Event) -> None:
        match event:
            case Start(steps, epochs, images):
                self._total = steps
                self.line(f"{steps:,} steps, {epochs} epochs of {images:,} images")
            case Resumed(epoch, step):
                self.line(f"resumed after epoch {epoch}, step {step:,}")
            case Baseline(top1, _, _):
                self.line(f"before: {self._figure} {accuracy(top1)}")
            case Step(step, loss, lr, speed, _):
                note = f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} images/s"
                self.update(step, self._total, note, "training")
            case EvalStep(images, total, speed):
                self.update(images, total, f"{speed:,.0f} images/s", "evaluating")
            case EpochEnd(epoch, loss, top1, _, seconds):
                score = f", {self._figure} {accuracy(top1)}" if top1 is not None else ""
                self.line(f"epoch {epoch}: loss {loss:.3f}{score}, {seconds:.0f} s")
            case Skipped(count, example):
                what = "image that can't be read:" if count == 1 else "images that can't be read,"
                self.line(f"skipped {count} {what} {'' if count == 1 else 'such as '}{example}")
            case Unlabelled(images):
                self._figure = "agreement"
                self.line(f"{images:,} images have no labels: measuring agreement with the teacher")
            case NotCompiled(reason):
                self.line(f"not compiled: {reason}")
            case Checkpointed():
                pass
