"""A part of a matrix as an expression over parts of its factors."""

from __future__ import annotations

from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Permute, Slice, transpose
from tiedconv.core.pad import Pad, padded


def part(expr: Expr, dim: int, start: int, stop: int) -> Expr:
    """Rows (`dim` 0) or columns (1) `start` to `stop`, not included, of a matrix.

    Products, sums, scales and concatenations are cut at their leaves, so that factors of the part
    can be applied one by one as those of the whole can.
    """
    if (start, stop) == (0, expr.shape[dim]):
        return expr
    match expr:
        case Permute(x=x, dims=(1, 0)):
            return transpose(part(x, 1 - dim, start, stop))
        case MatMul(a=a, b=b) if len(a.shape) == len(b.shape) == 2:
            return (
                MatMul(part(a, 0, start, stop), b)
                if dim == 0
                else MatMul(a, part(b, 1, start, stop))
            )
        case Add(a=a, b=b) if a.shape == b.shape:
            return Add(part(a, dim, start, stop), part(b, dim, start, stop))
        case Mul(a=a, b=b) if a.shape == expr.shape and len(b.shape) == 2:
            scale = b if b.shape[dim] == 1 else part(b, dim, start, stop)
            return Mul(part(a, dim, start, stop), scale)
        case Pad(x=x, dim=along, size=size) if along != dim:
            return Pad(part(x, dim, start, stop), along, size)
        case Pad(x=x) if start < x.shape[dim]:
            return padded(part(x, dim, start, min(stop, x.shape[dim])), dim, stop - start)
        case Cat(xs=xs, dim=along):
            return _part_of_cat(xs, along, dim, start, stop)
    return Slice(expr, dim, start, stop)


def _part_of_cat(xs: tuple[Expr, ...], along: int, dim: int, start: int, stop: int) -> Expr:
    if along != dim:
        return Cat(tuple(part(x, dim, start, stop) for x in xs), along)
    found: list[Expr] = []
    at = 0
    for x in xs:
        size = x.shape[dim]
        first, last = max(start - at, 0), min(stop - at, size)
        if first < last:
            found.append(part(x, dim, first, last))
        at += size
    return found[0] if len(found) == 1 else Cat(tuple(found), dim)
