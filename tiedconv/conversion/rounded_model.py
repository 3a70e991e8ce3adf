"""The stored tensors of a fit as integers, and as a plan that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tiedconv.core.packed_codes import packed
from tiedconv.core.plan import Plan
from tiedconv.core.storage import CODES, COLUMNS, SCALES, IntFormat, prefix_of, quantized
from tiedconv.io.narrowing import halved
from tiedconv.numerics.rounding import Rounded, width_of

SizeOf = Callable[[Plan, Mapping[str, Tensor]], int]
"""The bytes of the file of a plan and its tensors."""


@dataclass(frozen=True)
class RoundedModel:
    """What `round_to_bytes` found.

    Args:
        plan: with packed integers.
        tensors: its stored tensors.
        cost: that rounding adds to that of the fit.
        step: that was chosen.
        bytes: of the file.
        integers: by the names of the tensors that they stand for.
        floats: the tensors of the fit, those of a group as rounding others left them.
        costs: what of `cost` is due to tensors that are rounded together, by their names; infinity
            for tables whose errors were not measured.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    cost: float
    step: float
    bytes: int
    integers: Mapping[str, Rounded] = field(repr=False, default_factory=dict)
    floats: Mapping[str, Tensor] = field(repr=False, default_factory=dict)
    costs: Mapping[tuple[str, ...], float] = field(repr=False, default_factory=dict)


def assembled(
    plan: Plan,
    floats: Mapping[str, Tensor],
    found: Mapping[str, Rounded],
    widths: tuple[int, int],
) -> tuple[Plan, dict[str, Tensor]]:
    """A plan that reads integers, and what it stores.

    Args:
        plan: that stores floats.
        floats: its tensors.
        found: the integers of some of them.
        widths: of the integers, the fewest and the most bits.
    """
    formats: dict[str, IntFormat] = {}
    tensors = {name: halved(t) for name, t in floats.items() if name not in found}
    for name, rounded in found.items():
        bits, prefix = width_of(rounded.values, *widths), prefix_of(name, plan)
        rows = floats[name].shape[0]
        groups = len(rounded.rows) // rows  # of a table, the rows of all its matrices
        columns = rounded.values.numel() // rows
        group = rounded.values.shape[1] if groups > 1 else 0
        formats[name] = IntFormat(bits, group, rounded.columns is not None)
        tensors[f"{prefix}/{CODES}"] = packed(rounded.values, bits)
        tensors[f"{prefix}/{SCALES}"] = rounded.rows.reshape(rows, groups)
        if rounded.columns is not None:
            tensors[f"{prefix}/{COLUMNS}"] = rounded.columns.reshape(1, columns)
    return quantized(plan, formats), tensors
