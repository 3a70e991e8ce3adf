"""Progress events of training and evaluation. Metrics are fractions from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tiedconv.training.metrics import ACCURACY, Metrics


@dataclass(frozen=True)
class Start:
    """Training is about to begin.

    Attributes:
        steps: optimiser steps in total.
        epochs: in total; the last may be partial.
        images: in the training set.
        metrics: names of the validation metrics, the primary one first.
    """

    steps: int
    epochs: int
    images: int
    metrics: tuple[str, ...] = ACCURACY


@dataclass(frozen=True)
class Resumed:
    """A checkpoint was loaded, after `epoch` complete epochs and `step` steps."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Baseline:
    """The model was evaluated before any training."""

    metrics: Metrics
    loss: float


@dataclass(frozen=True)
class TeacherScore:
    """The teacher was evaluated on the same images."""

    metrics: Metrics


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
        """Mean of `losses`."""
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

    `metrics` is empty when this epoch was not evaluated.
    """

    epoch: int
    loss: float
    metrics: Metrics
    seconds: float
    step: int


@dataclass(frozen=True)
class RateFound:
    """The peak learning rate was chosen for the model and the data.

    Attributes:
        lr: the peak learning rate.
        tried: learning rate to held-out loss after one step with it.
        start: held-out loss before.
    """

    lr: float
    tried: Mapping[float, float]
    start: float


@dataclass(frozen=True)
class KeptBest:
    """A training ends with the state whose loss on held-out images was lowest.

    Attributes:
        kept: after which step it was; 0 is the start.
        steps: of the training.
        start: held-out loss before training.
        loss: held-out loss of the state.
    """

    kept: int
    steps: int
    start: float
    loss: float


@dataclass(frozen=True)
class Skipped:
    """`count` distinct images could not be read so far; `example` is the first."""

    count: int
    example: str


@dataclass(frozen=True)
class ClassesMatched:
    """How the classes of the data were matched to the model's outputs.

    Args:
        how: `name`, `class map`, `position` or `index`.
        classes: the number of classes of the data.
        numbers_as_text: a folder whose name is another number than its label, "" if none.
    """

    how: str
    classes: int
    numbers_as_text: str = ""


@dataclass(frozen=True)
class ImagesPrepared:
    """How images are prepared.

    Args:
        preprocess: as `Preprocess.to_json` gives it; None if the model does not say.
        native_size: height and width that the model was built for, if it says so.
    """

    preprocess: Mapping[str, Any] | None
    native_size: tuple[int, int] | None


@dataclass(frozen=True)
class Unlabelled:
    """The images have no labels: the agreement with the teacher is measured."""

    images: int


@dataclass(frozen=True)
class Detecting:
    """A detector is trained: average precision is measured."""

    images: int
    objects: int


@dataclass(frozen=True)
class NotCompiled:
    """The model can't be compiled, for this reason; training continues without."""

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
    | ClassesMatched
    | ImagesPrepared
    | Checkpointed
    | Unlabelled
    | Detecting
    | NotCompiled
    | KeptBest
    | RateFound
)

OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """No-op callback."""
