"""Block-wise calibration: each block of a tied model is fitted to the original's, without labels.

Span by span in order of execution, the compact network's output is brought close to the
original's on calibration images. The compact span reads what the compact network so far gives,
the original span what the original gives, so that errors are corrected instead of accumulating.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration.activation_cache import (
    Cache,
    ReadImages,
    Stream,
    read_images,
    release,
    take,
)
from tiedconv.calibration.config import CalibConfig
from tiedconv.calibration.events import (
    BlockwiseResult,
    Fitted,
    Fitting,
    Joint,
    OnCalibEvent,
    SpanResult,
    ignore,
)
from tiedconv.calibration.fitting import FitState, Schedule, mean_error, minimise
from tiedconv.calibration.frozen import frozen
from tiedconv.calibration.held_out import split
from tiedconv.calibration.objectives import JointObjective, SpanObjective, weighted
from tiedconv.calibration.output_metric import OutputMetric, measure_output_metrics
from tiedconv.calibration.sample_forms import Forms
from tiedconv.calibration.spans import Span
from tiedconv.calibration.state import KIND, checkpoint_path, identity_of, load_state, save_state
from tiedconv.calibration.teacher_student import Pair
from tiedconv.data import Loader
from tiedconv.errors import UserError
from tiedconv.io.run_state import foreign
from tiedconv.runtime.tie import state_of, unfreeze
from tiedconv.training.device import Placement, pick_device
from tiedconv.training.evaluation import EVENT_SECONDS

MUCH, MUCH_OF_UNIT = 0.05, 0.01
"""What must be lost for the highest learning rate: a divergence for each image, and a squared error
relative to a unit's outputs."""


@torch.enable_grad()  # a caller may have switched gradients off
def fit_blocks(
    student: nn.Module,
    teacher: nn.Module,
    data: Dataset[Any],
    config: CalibConfig | None = None,
    *,
    device: str | torch.device = "auto",
    workers: int | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    on_event: OnCalibEvent | None = None,
) -> BlockwiseResult:
    """Fits a tied model to its original, block by block, in place; both move to the device.

    A tenth of the images is held out, and no fit is kept that makes the error on these worse; of
    the whole model, the error on these and on shifted copies of them.
    On the CPU a calibration that was interrupted and resumed ends with the same bits as one that
    was not. The teacher's tensors, both models' modes, hooks and `requires_grad` stay as they
    were.

    Args:
        student: a tied model.
        teacher: the model that it was converted from, of the same class and module names.
        data: gives (image, label) in a form that `Loader` knows; labels are not used.
        config: the options; the defaults if None.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        workers: processes that read images; None chooses.
        checkpoint_dir: where to keep `calibration.safetensors`, written after each span
            and six times in the fit of the whole.
        resume: continue from that file; without the file, start at the beginning.
        on_event: called with each event.

    Returns:
        errors before and after. The student's parameters keep their identity.

    Raises:
        UserError: the student isn't tied, the teacher is another model; a device or checkpoint
            that doesn't fit.
        DataError: no image can be read.
        TrainingError: outputs that are not finite before any fit.
    """
    config = config or CalibConfig()
    state_of(student)  # raises if it isn't tied
    if resume and checkpoint_dir is None:
        raise UserError(
            "Nothing to resume from",
            hint="Give the checkpoint folder as well",
            code="nothing-to-resume",
        )
    if teacher is student:
        raise UserError(
            "Teacher and student are the same model",
            "There is nothing to learn from",
            "Convert a copy, as tiedconv.convert does without inplace",
            code="teacher-is-student",
        )
    path = None if checkpoint_dir is None else checkpoint_path(Path(checkpoint_dir))
    unfreeze(student)
    placement = Placement.choose(student, pick_device(device), config.amp)
    for model in (student, teacher):
        placement.place(model)
    loader = Loader(data, config.batch_size, workers=workers)
    try:
        with frozen(student, teacher), Cache(config.cache_bytes) as cache, closing(loader):
            found = read_images(loader, cache)
            loader.close()
            forms = Forms.of(student, found.images, loader.groups)
            pair = Pair.probed(student, teacher, found.images, placement, forms)
            run = _Run(config, pair, found, forms, cache, on_event or ignore)
            run.path = path
            return run.go(resume, found.broken)
    finally:
        placement.release(student, teacher)


@dataclass
class _Progress:
    """Where a calibration stands, as kept in the checkpoint."""

    fits: int = 0
    joint: bool = False
    seconds: float = 0.0
    start_error: float = math.nan
    end_error: float = math.nan
    kl_before: float = math.nan
    kl_after: float = math.nan
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    midway: FitState | None = None

    @classmethod
    def of(cls, saved: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> _Progress:
        midway = saved.pop("midway", None)
        try:
            at = None if midway is None else FitState(**{**midway, "tensors": tensors})
            return cls(**saved, midway=at)
        except TypeError as error:
            raise foreign(path, KIND) from error

    def split(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data and tensors, from which `of` makes it again."""
        if self.midway is None:
            return asdict(self), {}
        plain = dataclasses.replace(self.midway, tensors={})
        return asdict(dataclasses.replace(self, midway=plain)), self.midway.tensors


class _Run:
    """One call of `fit_blocks`."""

    def __init__(
        self, config: CalibConfig, pair: Pair, found: ReadImages, forms: Forms, cache: Cache,
        emit: OnCalibEvent,
    ) -> None:  # fmt: skip
        self.config, self.pair, self.images, self.cache = config, pair, found.images, cache
        self.forms, self.emit = forms, emit
        self.train, self.held = split(len(found.images), config.seed, found.lost)
        self.at = _Progress()
        self.path: Path | None = None
        self.streams: tuple[int, Stream, Stream] | None = None
        self.start = time.perf_counter()
        self._output_metrics: dict[str, OutputMetric | None] | None = None

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the checkpoint is of; asked for where there is a folder for one."""
        plan = state_of(self.pair.student.model).plan
        return identity_of(self.config, plan, self.pair.teacher.model, self.images)

    def go(self, resume: bool, broken: list[str]) -> BlockwiseResult:
        """Calibrates from the beginning or from the checkpoint to the end."""
        joint = self.joint_objective()
        start = [t.detach().clone() for t in self.state()] if self.config.total_passes else []
        if resume and self.path is not None and self.path.exists():
            saved, tensors = load_state(self.path, self.pair.student.model, self.identity)
            self.at = _Progress.of(saved, tensors, self.path)
        else:
            self.at.kl_before = self.divergence(joint)
            self.at.start_error = self.error(joint)
        self.start -= self.at.seconds
        spans = self.pair.spans
        while self.at.fits < self.config.total_passes * len(spans):
            self.fit_span(*divmod(self.at.fits, len(spans)))
        if not self.at.joint:
            if self.at.midway is None:
                self.keep_better(start, joint)
            self.fit_jointly(joint)
        results = zip(spans, self.at.before, self.at.after, strict=False)
        return BlockwiseResult(
            spans=tuple(SpanResult(s.units, before, after) for s, before, after in results),
            kl_before=self.at.kl_before,
            kl_after=self.at.kl_after,
            gained=self.at.end_error < self.at.start_error,
            images=len(self.images),
            held_out=len(self.held),
            skipped=len(broken),
            example_of_skipped=broken[0] if broken else None,
            seconds=self.at.seconds,
            held_batches=tuple(
                self.images[part] for part in self.forms.batches(self.held, self.config.batch_size)
            ),
        )

    def error(self, joint: JointObjective) -> float:
        """What decides, on the held-out images."""
        return mean_error(joint, self.held, self.config.batch_size)

    def divergence(self, joint: JointObjective) -> float:
        """What is reported: of the held-out images as they are, as `measure_agreement` does it."""
        exact = dataclasses.replace(joint.placement, autocast_in=None)
        return self.error(dataclasses.replace(joint, augment=False, placement=exact))

    def state(self) -> list[Tensor]:
        """All tensors of the student."""
        model = self.pair.student.model
        return [*model.parameters(), *model.buffers()]

    @torch.no_grad()
    def keep_better(self, start: list[Tensor], joint: JointObjective) -> None:
        """Restores the start if the model's outputs are worse although its blocks are better."""
        if not self.at.fits:
            return
        if self.error(joint) > self.at.start_error:
            for tensor, before in zip(self.state(), start, strict=True):
                tensor.copy_(before)

    def fit_span(self, number: int, index: int) -> None:
        """Fits one span and saves."""
        span, count = self.pair.spans[index], len(self.pair.spans)
        objective = self.span_objective(index)
        steps = self.config.span_steps(len(self.train))

        def report(step: int, loss: float) -> None:
            error = _relative(loss, span)
            self.emit(Fitting(span.units, index, count, number, step, steps, error))

        much = MUCH_OF_UNIT * len(span.units)
        schedule = self.schedule(steps, self.config.lr, much, number, index)
        before, after = (
            _relative(error, span)
            for error in minimise(
                objective, self.train, self.held, schedule, _throttled(report, steps)
            )
        )
        self.at.fits += 1
        if number == 0:
            self.at.before.append(before)
            self.at.after.append(after)
        self.at.after[index] = after
        self.save()
        self.emit(Fitted(span.units, index, count, number, before, after))

    def span_objective(self, index: int) -> SpanObjective:
        """The objective of a span, with its streams."""
        span, student, teacher = self.pair.spans[index], self.pair.student, self.pair.teacher
        ours, theirs = self.streams_of(index)
        metrics = [self.output_metrics().get(unit) for unit in span.units]
        objective = SpanObjective(
            modules=student.modules(span),
            parameters=self.pair.parameters(span.units),
            student=weighted(student.outputs(span), metrics),
            teacher=weighted(teacher.outputs(span), metrics),
            student_stream=ours,
            teacher_stream=theirs,
            placement=student.placement,
            forms=self.forms,
        )
        objective.measure_energies(self.config.batch_size)
        return objective

    def output_metrics(self) -> dict[str, OutputMetric | None]:
        """What of each unit's output matters, measured when first asked for."""
        if self._output_metrics is None:
            names = [unit for span in self.pair.spans for unit in span.units]
            teacher = self.pair.teacher
            batches = (
                take(self.images, index, teacher.placement)
                for index in self.forms.batches(
                    torch.arange(len(self.images)), self.config.batch_size
                )
            )
            units = [teacher.model.get_submodule(name) for name in names]
            found = measure_output_metrics(
                teacher.model, units, batches, teacher.placement, self.config.seed
            )
            self._output_metrics = dict(zip(names, found, strict=True))
        return self._output_metrics

    def streams_of(self, index: int) -> tuple[Stream, Stream]:
        """What reaches a span in the student and in the teacher.

        After a resume the streams are advanced from where they began, just as they would have
        been, so that they have the same bits.
        """
        spans, size = self.pair.spans, self.config.batch_size
        entry = spans[index].entry
        if entry is None:
            if self.streams is not None:
                release(self.streams[1:], self.cache)
            ours, theirs = (
                side.stream(spans[index], self.images, size, self.cache)
                for side in (self.pair.student, self.pair.teacher)
            )
        elif self.streams is not None and self.streams[0] == index - 1:
            ours, theirs = (
                side.advance(stream, spans[index - 1], entry, size, self.cache)
                for side, stream in zip(
                    (self.pair.student, self.pair.teacher), self.streams[1:], strict=True
                )
            )
        else:
            self.streams_of(index - 1)
            return self.streams_of(index)
        self.streams = index, ours, theirs
        return ours, theirs

    def joint_objective(self) -> JointObjective:
        """The objective of the whole model, without the units' errors."""
        student, teacher = self.pair.student, self.pair.teacher
        return JointObjective(
            model=student.model,
            parameters=[p for p in student.model.parameters() if p.is_floating_point()],
            units=[m for span in self.pair.spans for m in student.modules(span)],
            teacher=teacher.model,
            teacher_units=[m for span in self.pair.spans for m in teacher.modules(span)],
            images=self.images,
            placement=student.placement,
            forms=self.forms,
            augment=self.config.augment and self.config.total_joint_steps(1) > 0,
        )

    def fit_jointly(self, objective: JointObjective) -> None:
        """Fits the whole model; without steps, estimates the batch norms' statistics alone."""
        if self.streams is not None:
            release(self.streams[1:], self.cache)
            self.streams = None
        steps = self.config.total_joint_steps(len(self.train))
        if steps:
            objective.measure_energies(self.config.batch_size)

        def report(step: int, loss: float) -> None:
            self.emit(Joint(step, steps, loss))

        schedule = self.schedule(steps, self.config.joint_lr, MUCH, self.config.total_passes, 0)
        _, self.at.end_error = minimise(
            objective, self.train, self.held, schedule, _throttled(report, steps),
            self.at.midway, self.save_midway if self.path is not None else None,
        )  # fmt: skip
        self.at.kl_after = self.divergence(objective)
        self.at.joint, self.at.midway = True, None
        self.save()

    def save_midway(self, midway: FitState) -> None:
        """Keeps where the fit of the whole is: for a large model it takes the longest."""
        self.at.midway = midway
        self.save()

    def schedule(self, steps: int, lr: float, much: float, number: int, index: int) -> Schedule:
        """How a fit goes; its order of images depends on which fit it is."""
        config, seed = self.config, (self.config.seed, 2, number, index)
        return Schedule(steps, lr, much, config.clip, config.batch_size, seed)

    def save(self) -> None:
        """Writes the checkpoint, if there is a folder for it."""
        self.at.seconds = time.perf_counter() - self.start
        if self.path is not None:
            plain, tensors = self.at.split()
            save_state(self.path, self.pair.student.model, self.identity, plain, tensors)


def _relative(error: float, span: Span) -> float:
    """The relative error of a mean unit from the sum of squared ones."""
    return math.sqrt(error / len(span.units)) if error >= 0 else error


def _throttled(report: Callable[[int, float], None], steps: int) -> Callable[[int, float], None]:
    """Reports the last step, and those before at most ten times a second."""
    reported = time.perf_counter()

    def maybe(step: int, loss: float) -> None:
        nonlocal reported
        now = time.perf_counter()
        if step == steps or now - reported >= EVENT_SECONDS:
            reported = now
            report(step, loss)

    return maybe
