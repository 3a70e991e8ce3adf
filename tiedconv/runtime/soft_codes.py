"""Integers that can be trained: floats that are rounded each time they are used.

`soften` puts floats in place of packed codes; a weight is computed from them rounded, and the
gradient passes as if they were not (straight-through). `harden` packs them again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tiedconv.core.packed_codes import integers_of, packed, unpacked
from tiedconv.core.storage import SCALES, steps_of
from tiedconv.runtime.tie import state_of

LR_SCALES = "_lr_scales"
"""The attribute of a model that says what the learning rates of some parameters, by name, are
multiplied by."""

USUAL_RMS = 0.05
"""Root mean square of a usual weight, which usual learning rates are meant for."""

COARSER = tuple(1.01**i for i in range(24))
"""Factors that steps are lengthened by, until integers take few enough bytes."""


@torch.no_grad()
def soften(model: nn.Module) -> None:
    """Let the integers of a tied model be trained, in place; it can't be saved meanwhile.

    Integers and their scales get learning rates in proportion to their size (`LR_SCALES`): Adam
    moves every entry alike, and these are hundreds of times larger or smaller than weights.
    """
    plan = state_of(model).plan
    for name, node in plan.codes.items():
        codes = model.get_parameter(name)
        values = unpacked(codes.detach(), node.shape, node.bits).float()
        model._parameters[name] = nn.Parameter(values)
    names = (*plan.codes, *steps_of(plan))
    sizes = {name: _rms(model.get_parameter(name)) for name in names}
    if sizes:
        setattr(model, LR_SCALES, {name: size / USUAL_RMS for name, size in sizes.items()})


def _rms(parameter: nn.Parameter) -> float:
    return max(1e-6, float(parameter.detach().float().square().mean().sqrt()))


@torch.no_grad()
def harden(model: nn.Module, fits: Callable[[], bool] | None = None) -> bool:
    """Round and pack what `soften` made trainable, in place.

    Args:
        model: softened.
        fits: whether the model as it is now takes few enough bytes. While it does not, steps are
            lengthened by a hundredth, so that integers are smaller; after 24 times it is left.

    Returns:
        whether it fits.
    """
    plan = state_of(model).plan
    model.__dict__.pop(LR_SCALES, None)
    masters = {name: model.get_parameter(name).detach() for name in plan.codes}
    scales = [name for name, part in steps_of(plan).items() if part == SCALES]
    kept = {name: model.get_parameter(name).detach().clone() for name in scales}
    for coarser in COARSER:
        for name, node in plan.codes.items():
            values = (masters[name] / coarser).round().clamp(*integers_of(node.bits))
            model._parameters[name] = nn.Parameter(packed(values, node.bits), requires_grad=False)
        for name, scale in kept.items():
            model.get_parameter(name).copy_(scale * coarser)
        if fits is None or fits():
            return True
    return False
