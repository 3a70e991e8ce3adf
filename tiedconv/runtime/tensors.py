"""The tensors of a model."""

from __future__ import annotations

from torch import Tensor, nn


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state dict, parameters as such, under every name they have.

    A state dict may hold other objects too: what a module's `get_extra_state` returns.
    """
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
