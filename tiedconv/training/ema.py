"""Exponential moving average (EMA) of a model's weights; each stored tensor is averaged once.

Averaging the iterates reduces the noise of the last steps (Polyak and Juditsky, 1992). torch's
AveragedModel is not used: it copies the whole model, keeps half precision, has no warm-up of the
decay and can't be swapped in for an evaluation. A tied model's weights are computed from stored
tensors, so averages are kept of these alone, and the ties hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.runtime.tensors import state_tensors
from tiedconv.training.dtensor import full_tensor, local_tensor, shard_like


class Ema:
    """Averages of the trainable parameters of a model, which begin at their present values.

    The decay is warmed up, as min(decay, (1 + t) / (10 + t)) after t updates: a short run is not
    held back by where it began. Buffers are not averaged: an average of batch norm statistics
    would belong to none of the models that they were taken from. The averaged model has the
    buffers of the model as it is, and keeps what an evaluation makes of them.

    Args:
        model: its parameters are read at each update; no copy of the model is made.
        decay: weight of the old average in the new one, from 0 to less than 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        # Each once, however many modules use it.
        self._own = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._averages = {n: _copy(p) for n, p in self._own.items()}
        # Those that a state dict holds; a module may have more, but not as part of what it is.
        self._own_buffers = {
            n: t for n, t in state_tensors(model).items() if not isinstance(t, nn.Parameter)
        }
        self._buffers: dict[str, Tensor] = {}

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """Parameter name to its average, of the same shape; float32 where it has half of that."""
        return self._averages

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present values into the averages; call it after each optimiser step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = [local_tensor(average) for average in self._averages.values()]
        own = [
            local_tensor(p).to(a.dtype) for p, a in zip(self._own.values(), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, own, 1 - decay)
        self.updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """A context in which the model has the averages as its weights.

        Afterwards its weights and buffers are the bits of before. What happened to the buffers
        meanwhile, such as batch norm statistics for these weights, is kept for `settle`.
        """
        weights = {n: p.detach().clone() for n, p in self._own.items()}
        buffers = {n: b.clone() for n, b in self._own_buffers.items()}
        try:
            _fill(self._own, self._averages)
            yield
        finally:
            self._buffers = {n: b.clone() for n, b in self._own_buffers.items()}
            _fill(self._own, weights)
            _fill(self._own_buffers, buffers)

    def settle(self) -> None:
        """Leaves the averages in the model for good, with the buffers of the last `swapped`."""
        _fill(self._own, self._averages)
        _fill(self._own_buffers, self._buffers)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which `load_state_dict` goes on. All processes must call it."""
        return {
            "updates": self.updates,
            "averages": {name: full_tensor(tensor) for name, tensor in self._averages.items()},
            "buffers": dict(self._buffers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state over.

        Raises:
            KeyError: it lacks a parameter, or has one that the model lacks.
            RuntimeError: a tensor of another shape.
        """
        if state["averages"].keys() != self._averages.keys():
            raise KeyError("the averages are of other parameters")
        _fill(self._averages, state["averages"])
        self._buffers = {n: b.to(self._own_buffers[n].device) for n, b in state["buffers"].items()}
        self.updates = int(state["updates"])


def _copy(parameter: nn.Parameter) -> Tensor:
    # In half precision a small share of a new value would be rounded away.
    wide = parameter.dtype in (torch.float16, torch.bfloat16)
    copy = parameter.detach().clone()
    return copy.float() if wide else copy


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors in place, where the names have one."""
    for name, value in values.items():
        own[name].copy_(shard_like(value, own[name]))
