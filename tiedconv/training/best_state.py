"""The best state of a run so far: the start is one, so that a run never ends below it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.runtime.tensors import state_tensors
from tiedconv.training.dtensor import full_tensor, shard_like

CHECKS = 8
"""How often a run is looked at on the way, at most; its evaluations are further looks."""

SHARE = 4
"""A run sees at least so many times as many images in training as in looks on the way."""


def check_steps(steps: int, batch_size: int, images: int, per_epoch: int | None) -> frozenset[int]:
    """After which steps a run is looked at, besides its end and its evaluations.

    Args:
        steps: of the run.
        batch_size: training images in a step.
        images: of one look.
        per_epoch: steps between two evaluations; None if there are none on the way.
    """
    count = min(CHECKS, steps * batch_size // (SHARE * max(1, images)))
    found = frozenset(round(steps * i / count) for i in range(1, count)) - {0, steps}
    return frozenset(step for step in found if not per_epoch or step % per_epoch)


class BestState:
    """Parameters and buffers of the model where its held-out loss was lowest.

    Args:
        model: on its device; sharded or not.

    Attributes:
        step: after which it was.
        loss: there.
        start: the loss before the first step.
        last: the step after which the model was last looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        self._own = state_tensors(model)
        self._kept: dict[str, Tensor] = {}
        self.step, self.loss, self.start, self.last = 0, float("inf"), float("inf"), 0

    def consider(self, step: int, loss: float) -> None:
        """Keep the model as it is now, if it is better than all before."""
        self.last = step
        if step == 0:
            self.start = loss
        if loss < self.loss or step == 0:
            self.step, self.loss = step, loss
            self._kept = {name: t.detach().clone() for name, t in self._own.items()}

    @property
    def is_last(self) -> bool:
        """Whether the model as last looked at is the best."""
        return self.step == self.last

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model its best tensors."""
        for name, tensor in self._kept.items():
            self._own[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. All processes must call it."""
        return {
            "step": self.step, "loss": self.loss, "start": self.start, "last": self.last,
            "tensors": {name: full_tensor(t) for name, t in self._kept.items()},
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state over.

        Raises:
            KeyError: it is of another model.
        """
        self.step, self.last = int(state["step"]), int(state["last"])
        self.loss, self.start = float(state["loss"]), float(state["start"])
        self._kept = {
            name: shard_like(tensor.to(self._own[name].device), self._own[name])
            for name, tensor in state["tensors"].items()
        }
