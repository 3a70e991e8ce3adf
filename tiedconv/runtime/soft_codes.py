"""Integers that can be trained: floats that are rounded each time they are used.

`soften` puts floats in place of packed codes; a weight is computed from them rounded, and the
gradient passes as if they were not (straight-through). `harden` packs them again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiedconv.core.packed_codes import integers_of, packed, unpacked
from tiedconv.core.storage import SCALES, steps_of
from tiedconv.runtime.tie import state_of

LR_SCALES = "_lr_scales"
"""The attribute of a model that says what the learning rates of some parameters, by name, are
multiplied by."""

USUAL_RMS = 0.05
"""Root mean square of a usual weight, which usual learning rates are meant for."""

TOWARDS_ZERO = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3)
"""Fractions of a step, past the middle between two integers, up to which values are rounded to the
smaller one, until integers take few enough bytes."""

LONGER = tuple(1.01**i for i in range(1, 24))
"""Factors that steps are lengthened by, where that does not suffice."""


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
        fits: whether the model as it is now takes few enough bytes. While it does not, values near
            the middle between two integers are rounded towards zero, more and more of them: small
            integers take fewer bits. To either integer such a value is equally far, so little is
            lost. Where that does not suffice, steps are lengthened, which moves all of them; after
            some times it is left.

    Returns:
        whether it fits.
    """
    plan = state_of(model).plan
    model.__dict__.pop(LR_SCALES, None)
    masters = {name: model.get_parameter(name).detach() for name in plan.codes}
    scales = [name for name, part in steps_of(plan).items() if part == SCALES]
    kept = {name: model.get_parameter(name).detach().clone() for name in scales}
    ways = [*((margin, 1.0) for margin in TOWARDS_ZERO), *((TOWARDS_ZERO[-1], f) for f in LONGER)]
    for margin, longer in ways:
        for name, node in plan.codes.items():
            values = _rounded(masters[name] / longer, margin).clamp(*integers_of(node.bits))
            model._parameters[name] = nn.Parameter(packed(values, node.bits), requires_grad=False)
        for name, scale in kept.items():
            model.get_parameter(name).copy_(scale * longer)
        if fits is None or fits():
            return True
    return False


def _rounded(values: Tensor, margin: float) -> Tensor:
    """To the nearest integer, but to the one nearer to zero up to `margin` past the middle."""
    if not margin:
        return values.round()
    return values.sign() * (values.abs() + (0.5 - margin)).floor()
