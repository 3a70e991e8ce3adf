"""Integers that can be trained: floats that are rounded each time they are used.

`soften` puts floats in place of packed codes; a weight is computed from them rounded, and the
gradient passes as if they were not (straight-through). `harden` packs them again.
"""

from __future__ import annotations

import torch
from torch import nn

from tiedconv.core.packed_codes import integers_of, packed, unpacked
from tiedconv.runtime.tie import state_of


@torch.no_grad()
def soften(model: nn.Module) -> None:
    """Let the integers of a tied model be trained, in place; it can't be saved meanwhile."""
    for name, node in state_of(model).plan.codes.items():
        codes = model.get_parameter(name)
        values = unpacked(codes.detach(), node.shape, node.bits).float()
        model._parameters[name] = nn.Parameter(values)


@torch.no_grad()
def harden(model: nn.Module) -> None:
    """Round and pack what `soften` made trainable, in place."""
    for name, node in state_of(model).plan.codes.items():
        values = model.get_parameter(name).detach()
        codes = packed(values.round().clamp(*integers_of(node.bits)), node.bits)
        model._parameters[name] = nn.Parameter(codes, requires_grad=False)
