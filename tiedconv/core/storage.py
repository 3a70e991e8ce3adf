"""Storage formats: in how many bits the stored tensors of a plan are kept.

A plan from a scheme stores floats. `quantized` gives the same plan with some of them stored as
packed integers and their scales. Schemes, fits and ties know nothing of it: an expression reads
`Dequantize(codes, scales)` where it read the tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from tiedconv.core.expr import Dequantize, Expr, Mul, Ref, Shape, reshape
from tiedconv.core.packed_codes import WIDTHS, packed_length
from tiedconv.core.plan import Plan, stored_name
from tiedconv.errors import PlanError

CODES, SCALES, COLUMNS = "codes", "scales", "columns"
"""The names of what is stored for a quantised tensor, after its own."""
PARTS = (CODES, SCALES, COLUMNS)


@dataclass(frozen=True)
class IntFormat:
    """Integers with scales.

    Args:
        bits: of each code.
        group: columns that share a scale; 0 for a scale a row.
        columns: whether each column has a factor besides, for all rows.
    """

    bits: int = 8
    group: int = 0
    columns: bool = False

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS or self.group < 0:
            raise PlanError(
                f"There are no {self.bits}-bit integers in groups of {self.group}",
                hint=f"Choose one of {', '.join(map(str, WIDTHS))} bits",
                code="invalid-format",
            )

    def groups(self, columns: int) -> int:
        """Scales a row."""
        return -(-columns // self.group) if self.group else 1

    def tensors(self, name: str, rows: int, columns: int) -> dict[str, Shape]:
        """What is stored for a matrix: name to shape.

        Args:
            name: of the matrix, as a stored tensor.
            rows, columns: of the matrix.
        """
        found: dict[str, Shape] = {
            f"{name}/{CODES}": (packed_length(rows * columns, self.bits),),
            f"{name}/{SCALES}": (rows, self.groups(columns)),
        }
        if self.columns:
            found[f"{name}/{COLUMNS}"] = (1, columns)
        return found

    def expression(self, name: str, rows: int, columns: int) -> Expr:
        """The matrix, from what is stored for it."""
        codes, scales, *more = (Ref(n, s) for n, s in self.tensors(name, rows, columns).items())
        matrix: Expr = Dequantize(codes, scales, self.bits, columns)
        return Mul(matrix, more[0]) if more else matrix


def prefix_of(name: str, plan: Plan) -> str:
    """What the names of a quantised tensor begin with.

    Args:
        name: of a factor of the plan, or of a kept tensor.
    """
    return name if name in plan.factors else stored_name(name, "values")


def quantized(plan: Plan, formats: Mapping[str, IntFormat]) -> Plan:
    """The plan with some of its stored tensors as integers.

    Args:
        plan: that stores them as floats.
        formats: names of factors, or of kept tensors that are no buffers, of two dimensions or
            more; a kernel is the matrix `(out, in * kh * kw)`.

    Raises:
        PlanError: it stores no such tensor, or has it as integers already (`unknown-tensor`).
    """
    for name in formats:
        if name not in plan.factors and (name not in plan.kept or name in plan.buffers):
            raise PlanError(
                f"The plan stores no tensor {name} that could be quantised",
                hint="Name a factor, or a weight that is kept",
                code="unknown-tensor",
            )

    def stored(ref: Ref) -> Expr:
        format_ = formats.get(ref.name)
        return ref if format_ is None else as_integers(ref.name, ref.shape, format_)

    weights = {name: expr.substitute(stored) for name, expr in plan.weights.items()}
    kept = dict(plan.kept)
    for name in formats.keys() & plan.kept.keys():
        shape = kept.pop(name)
        weights[name] = as_integers(prefix_of(name, plan), shape, formats[name])
    found = dataclasses.replace(plan, weights=dict(sorted(weights.items())), kept=kept)
    found.validate()
    return found


def quantised_shape(plan: Plan, name: str) -> Shape | None:
    """The shape of a factor that is stored as integers, None if it is not."""
    codes = plan.codes.get(f"{name}/{CODES}")
    return None if codes is None else codes.shape


def steps_of(plan: Plan) -> dict[str, str]:
    """The stored scales and column factors of a plan's integers: name to `scales` or `columns`."""
    found = {
        f"{name.rpartition('/')[0]}/{part}": part
        for name in plan.codes
        for part in (SCALES, COLUMNS)
    }
    return {name: part for name, part in found.items() if name in plan.factors}


def as_integers(name: str, shape: Shape, format_: IntFormat) -> Expr:
    """A stored tensor of any shape from the integers of its matrix."""
    rows = shape[0]
    return reshape(format_.expression(name, rows, math.prod(shape) // rows), shape)
