"""The fit itself: minimise an objective over some tensors and keep the best held-out state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tiedconv.calibration.sample_forms import Forms
from tiedconv.data.grouping import even
from tiedconv.errors import TrainingError
from tiedconv.training.batchnorm import averaged_statistics, batch_statistics, norms_of
from tiedconv.training.optim import half_cosine

WARMUP_RATIO = 0.05
"""Fraction of the steps in which the learning rate rises."""

MIN_LR_RATIO = 0.01
"""The learning rate of the last step relative to the highest."""

CHECKS = 6
"""Measurements on held-out images along a fit."""

LEAST_ERROR = 2e-4
"""Of the error from which the learning rate is the highest, below which it is not lowered."""

MIN_RMS = 0.01
"""A tensor is taken to have at least this root mean square: a zero bias must move too."""


class Objective(Protocol):
    """What is to be minimised. Indices are of images, on the CPU."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The student's modules that take part."""

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """What is fitted."""

    @property
    def forms(self) -> Forms:
        """Of the images."""

    def loss(self, index: Tensor, draws: np.random.Generator) -> Tensor:
        """A scalar with a gradient, the mean over these images; what is random in it is drawn."""

    def error(self, index: Tensor) -> float:
        """The mean over these images of what decides which state is kept."""

    def run(self, index: Tensor) -> None:
        """Runs the student's modules, for the sake of their batch norms."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to fit.

    Attributes:
        steps: how many.
        lr: the highest learning rate, of a fit whose error at the start is `much`.
        much: the error from which the learning rate is the highest; below, it goes with the root,
            as errors are quadratic in how far the weights are from where they should be.
        clip: the largest norm of the gradient; 0 for no clipping.
        batch_size: images in a step.
        seed: of the order of images.
    """

    steps: int
    lr: float
    much: float
    clip: float
    batch_size: int
    seed: tuple[int, ...]

    def lr_for(self, error: float) -> float:
        """The highest learning rate of a fit with this error at the start."""
        return self.lr * math.sqrt(min(1.0, max(LEAST_ERROR, error / self.much)))


@dataclass(frozen=True)
class FitState:
    """A fit between two of its steps: what resuming needs besides the student's tensors.

    Args:
        step: steps done.
        before: the held-out error at the start.
        best: the smallest since.
        norms: whether batch norms get their statistics measured again.
        rates: learning rates of the parameters, relative to the schedule's.
        tensors: `best/N`, and Adam's state of the N-th parameter as `adam/N/...`.
    """

    step: int
    before: float
    best: float
    norms: bool
    rates: list[float]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def minimise(
    objective: Objective,
    train: Tensor,
    held: Tensor,
    schedule: Schedule,
    on_step: Callable[[int, float], None],
    midway: FitState | None = None,
    keep: Callable[[FitState], None] | None = None,
) -> tuple[float, float]:
    """Fits the objective's parameters, in place.

    Batch norms get their statistics measured over the training images before the fit. Where
    that helps, they run with the statistics of the batch in the fit, and are measured again
    before each measurement of the error; where it doesn't, they keep what they have. The state
    with the smallest held-out error is kept, and the state at the start is one of them.

    Args:
        objective: its modules are in evaluation mode.
        train: indices of the images to fit.
        held: indices of the held-out images.
        schedule: how long and how fast.
        on_step: called with the number of steps done and the last loss that was read.
        midway: where an interrupted fit resumes; the student is as it was there.
        keep: called now and then with where the fit is.

    Returns:
        the held-out error before and after.

    Raises:
        TrainingError: the error is not finite before any step.
    """
    best = _Best(objective, held, schedule.batch_size, midway)
    before = best.error if midway is None else midway.before
    if not math.isfinite(before):
        raise TrainingError(
            "The model's outputs are NaN or infinite before any fit",
            "There is nothing to fit",
            "Check the original model and the images; with bfloat16, choose --amp off",
            code="outputs-not-finite",
        )
    norms = norms_of(*objective.modules) if midway is None or midway.norms else []
    if norms and midway is None:
        estimate(norms, objective, train, schedule.batch_size)
        if not best.consider():
            # The original's own statistics are not those of these images.
            best.restore()
            norms = []
    if schedule.steps and objective.parameters:
        try:
            loop = _OptimLoop(objective, schedule, before, norms, best, midway)
            loop.run(train, on_step, keep)
        finally:
            for parameter in objective.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            best.restore()
    else:
        best.restore()
    return before, best.error


class _OptimLoop:
    """The steps of a fit, from the first or from midway."""

    def __init__(
        self,
        objective: Objective,
        schedule: Schedule,
        before: float,
        norms: Sequence[_BatchNorm],
        best: _Best,
        midway: FitState | None,
    ) -> None:
        self._objective, self._schedule, self._before = objective, schedule, before
        self._lr = schedule.lr_for(before)
        self._norms, self._best = norms, best
        for parameter in objective.parameters:
            parameter.requires_grad_(True)
        self._start = 0 if midway is None else midway.step
        self._rates = _rates(objective.parameters) if midway is None else midway.rates
        # Fits are short: a longer memory of squared gradients would outlast them.
        groups = [
            {"params": [p], "lr": rate}
            for p, rate in zip(objective.parameters, self._rates, strict=True)
        ]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        if midway is not None:
            self._load_optimizer(midway.tensors)

    def run(
        self,
        train: Tensor,
        on_step: Callable[[int, float], None],
        keep: Callable[[FitState], None] | None,
    ) -> None:
        """All steps that are left, or those before the loss is not finite."""
        schedule = self._schedule
        every = max(1, -(-schedule.steps // CHECKS))
        last_loss = 0.0
        for step, index in enumerate(_batches(train, schedule, self._objective.forms), 1):
            if step <= self._start:
                continue
            loss = self._step(step, index)
            last = step == schedule.steps
            # Reading a value waits for the device.
            if step % 10 == 1 or last:
                last_loss = float(loss.detach())
                if not math.isfinite(last_loss):
                    return  # what was best so far is kept
            on_step(step, last_loss)
            if last or step % every == 0:
                if self._norms:
                    estimate(self._norms, self._objective, train, schedule.batch_size)
                self._best.consider()
                if keep is not None and not last:
                    keep(self._midway(step))

    def _step(self, step: int, index: Tensor) -> Tensor:
        factor = _factor(step, self._schedule)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = self._lr * rate * factor
        with batch_statistics(self._norms if len(index) > 1 else ()):
            # Of its own step, so that a resumed fit draws the same.
            draws = np.random.default_rng((*self._schedule.seed, step))
            loss = self._objective.loss(index, draws)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        if self._schedule.clip:
            nn.utils.clip_grad_norm_(self._objective.parameters, self._schedule.clip)
        self._optimizer.step()
        return loss

    def _midway(self, step: int) -> FitState:
        memory = {
            f"adam/{i}/{name}": tensor
            for i, parameter in enumerate(self._objective.parameters)
            for name, tensor in self._optimizer.state[parameter].items()
        }
        tensors = {**memory, **self._best.tensors()}
        norms = bool(self._norms)
        return FitState(step, self._before, self._best.error, norms, self._rates, tensors)

    def _load_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "adam":
                number, _, what = rest.partition("/")
                parameter = self._objective.parameters[int(number)]
                # Adam counts its steps on the CPU.
                value = tensor.clone() if what == "step" else tensor.to(parameter, copy=True)
                self._optimizer.state[parameter][what] = value


def _rates(parameters: Sequence[nn.Parameter]) -> list[float]:
    """The root mean square of each tensor: its learning rate, before the schedule's factor."""
    return [max(MIN_RMS, float(p.detach().float().square().mean().sqrt())) for p in parameters]


def _factor(step: int, schedule: Schedule) -> float:
    """The learning rate of a step (from 1) relative to the highest: warm-up, then half a cosine."""
    warmup = WARMUP_RATIO * schedule.steps
    if step <= warmup:
        return step / (warmup + 1)
    done = (step - warmup) / max(1.0, schedule.steps - warmup)
    return MIN_LR_RATIO + (1 - MIN_LR_RATIO) * half_cosine(done)


def _batches(train: Tensor, schedule: Schedule, forms: Forms) -> Iterator[Tensor]:
    """A batch for each step, of nearly equal sizes, epoch after epoch in a new order."""
    random = np.random.default_rng(schedule.seed)
    groups = None if forms.groups is None else forms.groups[train.numpy()]
    step = 0
    while True:
        order = random.permutation(len(train))
        for part in even(order, schedule.batch_size, groups, random):
            if step == schedule.steps:
                return
            step += 1
            yield train[torch.from_numpy(part)]


class _Best:
    """The state with the smallest held-out error so far."""

    def __init__(
        self, objective: Objective, held: Tensor, batch_size: int, midway: FitState | None
    ) -> None:
        self._objective, self._held, self._batch_size = objective, held, batch_size
        buffers = [b for module in objective.modules for b in module.buffers()]
        self._tensors: list[Tensor] = [*objective.parameters, *buffers]
        self._state = self._copy()
        if midway is None:
            self.error = self._measure()
        else:
            self.error = midway.best
            for i, tensor in enumerate(self._state):
                tensor.copy_(midway.tensors[f"best/{i}"])

    def tensors(self) -> dict[str, Tensor]:
        """The best state, to resume from."""
        return {f"best/{i}": tensor for i, tensor in enumerate(self._state)}

    def consider(self) -> bool:
        """Measures the present state and keeps it if it is better; returns whether it is."""
        error = self._measure()
        better = error < self.error  # false for NaN
        if better:
            self.error, self._state = error, self._copy()
        return better

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best state back."""
        for tensor, value in zip(self._tensors, self._state, strict=True):
            tensor.copy_(value)

    def _measure(self) -> float:
        return mean_error(self._objective, self._held, self._batch_size)

    def _copy(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors]


@torch.no_grad()
def mean_error(objective: Objective, index: Tensor, batch_size: int) -> float:
    """The objective's error over some images."""
    parts = objective.forms.batches(index, batch_size)
    return sum(objective.error(part) * len(part) for part in parts) / len(index)


@torch.no_grad()
def estimate(
    norms: Sequence[_BatchNorm], objective: Objective, index: Tensor, batch_size: int
) -> None:
    """Replaces the statistics of batch norms by their plain average over some images."""
    parts = [part for part in objective.forms.batches(index, batch_size) if len(part) > 1]
    if not parts:  # one image has no variance
        return
    with averaged_statistics(norms):
        for part in parts:
            objective.run(part)
