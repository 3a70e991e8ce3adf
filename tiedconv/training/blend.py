"""Annealing from the original to the compact weights during training.

Training sets the schedule; what is blended, and how, is up to the `Blend`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from tiedconv.errors import UserError
from tiedconv.training.config import TrainConfig
from tiedconv.training.optim import half_cosine


class Blend(Protocol):
    """Adds a residual to a model that is annealed to zero during training."""

    def begin(self) -> None:
        """Adds the residual at weight 1.

        Called once, with the model on its device, before the first step.

        A resumed run calls it before it loads its state, so it must not depend on that.
        """

    def set(self, weight: float) -> None:
        """Sets the weight of the residual, from 1 to 0; at 0 it may be dropped for good."""

    def left_out(self) -> AbstractContextManager[None]:
        """A context without the residual: evaluations measure the compact model, as it is saved."""


def blend_weight(step: int, steps: int, fraction: float) -> float:
    """The weight of the original in `step`, counted from 0, out of `steps`: 1 in step 0.

    Falls along half a cosine over the first `fraction` of the steps, at least one; then 0.
    """
    duration = max(1, round(fraction * steps)) if fraction > 0 else 0
    return half_cosine(step / duration) if step < duration else 0.0


def check_blend(config: TrainConfig, blend: Blend | None) -> None:
    """Raises UserError when `progressive` is set without a blend."""
    if config.progressive > 0 and blend is None:
        raise UserError(
            f"The training option progressive is {config.progressive:g}, but no blend is given",
            "The model would be trained without it",
            "Pass blend=, or use tiedconv.finetune, which makes one from the original",
            code="blend-missing",
        )
