"""Bytes that integers of 8 bits leave of a budget: what costs most by its rounding stays float16.

Above about a quarter of the bytes every matrix has 8 bits, and a finer step would change nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from torch import Tensor

from tiedconv.conversion.rounded_model import RoundedModel, SizeOf, assembled
from tiedconv.core.plan import Plan

EXTRA = 1.15
"""Bytes that a number takes more in float16 than as 8 bits, which are deflated."""
TRIES = 6
LESS = 0.93
"""Of the bytes, where so many were too many."""


def with_floats(
    rounded: RoundedModel,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    budget: int,
    size_of: SizeOf,
    widths: tuple[int, int],
) -> RoundedModel:
    """The model with as many tensors in float16 as the budget has bytes for.

    Tables whose errors were not measured, such as depthwise kernels, come first: they are small,
    and one channel may carry much of the answer. Then whatever costs most a byte. Tensors that were
    rounded together are floats together, as they were fitted.

    Args:
        rounded: in at most so many bytes.
        plan: that stores floats.
        tensors: of the fit.
        budget: bytes of the file.
        size_of: measures a file.
        widths: of the integers, the fewest and the most bits.
    """
    sizes = {names: sum(tensors[n].numel() for n in names) for names in rounded.costs}
    order = sorted(
        rounded.costs,
        key=lambda names: (-rounded.costs[names] / max(1, sizes[names]), sizes[names], names),
    )
    spare = float(budget - rounded.bytes)
    for _ in range(TRIES):
        left, chosen = spare, list[tuple[str, ...]]()
        for names in order:
            if EXTRA * sizes[names] <= left:
                left -= EXTRA * sizes[names]
                chosen.append(names)
        if not chosen:
            break
        found = _unrounded(rounded, plan, tensors, chosen, widths)
        size = size_of(found.plan, found.tensors)
        if size <= budget:
            return dataclasses.replace(found, bytes=size)
        spare = LESS * spare
    return rounded


def _unrounded(
    rounded: RoundedModel,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    chosen: list[tuple[str, ...]],
    widths: tuple[int, int],
) -> RoundedModel:
    """The model with some tensors as they were fitted."""
    apart = {name for names in chosen for name in names}
    together = [
        {group.stored_name(factor) for factor in group.factors} for group in plan.groups
    ]  # fmt: skip
    apart |= {name for names in together if names & apart for name in names}
    floats = {n: tensors[n] if n in apart else t for n, t in rounded.floats.items()}
    integers = {n: each for n, each in rounded.integers.items() if n not in apart}
    costs = {names: cost for names, cost in rounded.costs.items() if not apart & {*names}}
    made, stored = assembled(plan, floats, integers, widths)
    return dataclasses.replace(
        rounded, plan=made, tensors=stored, integers=integers, floats=floats, costs=costs,
        cost=sum(cost for cost in costs.values() if math.isfinite(cost)),
    )  # fmt: skip
