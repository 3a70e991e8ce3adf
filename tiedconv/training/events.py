"""What training and evaluation tell while they run. Accuracies are shares from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """Training is about to begin: optimiser steps and epochs in all, training images."""

    steps: int
    epochs: int
    images: int


@dataclass(frozen=True)
class Resumed:
    """A checkpoint was loaded; `epoch` whole epochs and `step` steps are done already."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Baseline:
    """The model was evaluated as it came, before any training."""

    top1: float
    top5: float
    loss: float


@dataclass(frozen=True)
class TeacherScore:
    """The teacher was evaluated on the same images: what there is to reach."""

    top1: float
    top5: float


@dataclass(frozen=True)
class Step:
    """Progress; at most ten a second. `losses` are those of the last few steps, up to `step`."""

    epoch: int
    step: int
    losses: tuple[float, ...]
    lr: float
    images_per_second: float
    eta_seconds: float

    @property
    def loss(self) -> float:
        """The mean of them."""
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class EvalStep:
    """Progress of an evaluation; at most ten a second."""

    images: int
    total: int
    images_per_second: float


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over, after `step` steps in all. `loss` is its mean training loss.

    The accuracies are None when this epoch was not evaluated.
    """

    epoch: int
    loss: float
    top1: float | None
    top5: float | None
    seconds: float
    step: int


@dataclass(frozen=True)
class Skipped:
    """So many different images could not be read so far; `example` is the first."""

    count: int
    example: str


@dataclass(frozen=True)
class FewClasses:
    """The data name fewer classes than the model has outputs; told at each evaluation."""

    classes: int
    outputs: int


@dataclass(frozen=True)
class Unlabelled:
    """The images have no labels: what follows as top 1 is agreement with the teacher."""

    images: int


@dataclass(frozen=True)
class Detecting:
    """A detector is trained: what follows as top 1 and top 5 is AP and AP50."""

    images: int
    objects: int


@dataclass(frozen=True)
class NotCompiled:
    """The model can't be compiled, for this reason; training goes on without."""

    reason: str


@dataclass(frozen=True)
class Checkpointed:
    """The state of training after `step` steps was written to `path`."""

    path: str
    step: int


Event = (
    Start
    | Resumed
    | Baseline
    | TeacherScore
    | Step
    | EvalStep
    | EpochEnd
    | Skipped
    | FewClasses
    | Checkpointed
    | Unlabelled
    | Detecting
    | NotCompiled
)

OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The listener of those who don't listen."""
