"""Training that begins with another model than it ends with, and goes from one to the other.

Training only keeps the time; what is faded, and how, is the affair of whoever makes a `Blend`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from tiedconv.errors import UserError
from tiedconv.training.config import TrainConfig
from tiedconv.training.optim import half_cosine


class Blend(Protocol):
    """Adds something to a model that is to be gone when the training ends."""

    def begin(self) -> None:
        """Adds it whole. Called once, with the model on its device, before the first step.

        A resumed run calls it before it loads its state, so it must not depend on that.
        """

    def set(self, share: float) -> None:
        """Sets how much of it is left, from 1 to 0; at 0 it may be dropped for good."""

    def left_out(self) -> AbstractContextManager[None]:
        """A context in which none of it is there, for evaluations."""


def share_left(step: int, steps: int, share: float) -> float:
    """How much is left in `step`, counted from 0, out of `steps`: 1 in step 0.

    Falls along half a cosine over the first `share` of the steps, at least one; then 0.
    """
    fading = max(1, round(share * steps)) if share > 0 else 0
    return half_cosine(step / fading) if step < fading else 0.0


def check_fading(config: TrainConfig, fading: Blend | None) -> None:
    """Raises UserError when the options ask for a fading and there is none."""
    if config.progressive > 0 and fading is None:
        raise UserError(
            f"The training option progressive is {config.progressive:g}, but nothing to fade is "
            "given",
            "The model would be trained without it",
            "Pass fading=, or use tiedconv.finetune, which fades the original model",
            code="blend-missing",
        )
