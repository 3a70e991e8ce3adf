"""The expression of a whole tensor from those of its slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tiedconv.core.expr import Cat, Expr, Ref, reshape, transpose
from tiedconv.core.plan import Member, Slot, stored_name
from tiedconv.errors import PlanError


def assemble(pieces: Sequence[tuple[Slot, Expr]]) -> tuple[Expr, dict[str, Slot]]:
    """The expression of a whole tensor from those of some of its slots.

    Rows that no slot covers are stored as they are.

    Args:
        pieces: slots of one tensor with the expressions of their `(out, in)` matrices.

    Returns:
        the tensor's expression, and the stored rest: name to the slot it holds.
    """
    first = pieces[0][0]
    rest: dict[str, Slot] = {}
    parts: list[Expr] = []

    def keep(start: int, stop: int) -> None:
        gap = dataclasses.replace(first, start=start, stop=stop)
        name = stored_name(first.tensor, f"rows{start}-{stop}")
        rest[name] = gap
        parts.append(Ref(name, gap.matrix_shape))

    row = 0
    for slot, expr in sorted(pieces, key=lambda piece: piece[0].start):
        if slot.start < row:
            raise PlanError(
                f"Two groups give the same rows of {first.tensor}",
                "Its weight is not defined",
                "Give each tensor to one rule of the recipe",
                code="overlapping-slots",
            )
        if slot.start > row:
            keep(row, slot.start)
        parts.append(expr)
        row = slot.stop
    end = Slot.whole(first.tensor, first.shape, first.transposed).stop
    if row < end:
        keep(row, end)
    matrix = parts[0] if len(parts) == 1 else Cat(tuple(parts), 0)
    if first.transposed:
        return transpose(matrix), rest
    return reshape(matrix, first.shape), rest


def member_expr(member: Member, expr: Expr) -> Expr:
    """The `(out, in)` expression of a slot from that of the matrix that takes part."""
    return transpose(expr) if member.flip else expr
