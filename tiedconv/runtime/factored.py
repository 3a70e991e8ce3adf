"""Applying a weight to features factor by factor, without ever making the weight.

A linear layer needs `x W^T`, not W. By the algebra of `expr` the product goes factor by factor:
`x (B A)^T = (x A^T) B^T`, `x (base + R)^T = x base^T + x R^T`, a scale of rows scales the result,
joined rows join results, a generated weight (see `generated`) takes the features through its core.
So memory holds the stored tensors alone, and low ranks save time as well.

What a product is belongs to who runs it: torch, an ONNX graph, a counter. Each is a set of
`Operations`, and `apply` is the one place that knows the rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Permute, Ref, Reshape, Slice
from tiedconv.runtime.generator import Generated, parts_of

V = TypeVar("V")


class NotFactorableError(Exception):
    """The expression is no product, sum or join of stored matrices; it has to be made."""


class Operations(Protocol[V]):
    """What `apply` needs of features, whose last dimension (or channels) it transforms."""

    def product(self, x: V, matrix: Expr, turned: bool) -> V:
        """`x M^T`, or `x M` if turned; M is a stored matrix, or a part of one."""

    def scaled(self, x: V, vector: Expr) -> V:
        """Each feature times its number; the vector is `(n, 1)`, `(1, n)` or `(1, 1)`."""

    def added(self, a: V, b: V) -> V:
        """The sum."""

    def joined(self, parts: Sequence[V]) -> V:
        """Features one after another."""

    def parted(self, x: V, sizes: Sequence[int]) -> list[V]:
        """Features in groups of these sizes."""

    def generated(self, x: V, parts: Generated) -> V:
        """`sum_k B_k^g X_k A_k^g` of all groups g, row by row, where x is `(terms * r * s)`."""


def matrix_of(expr: Expr) -> Expr:
    """The matrix `(out, in * kh * kw)` of a convolution's kernel; a matrix is itself.

    Raises:
        NotFactorableError: the kernel is not a matrix in another shape.
    """
    rows = expr.shape[0]
    while isinstance(expr, Reshape) and len(expr.shape) > 2:
        expr = expr.x
    if len(expr.shape) == 2 and expr.shape[0] == rows:
        return expr
    if isinstance(expr, Ref):
        return Reshape(expr, (rows, math.prod(expr.shape[1:])))
    raise NotFactorableError


def apply(expr: Expr, x: V, on: Operations[V], turned: bool = False) -> V:
    """`x E^T`, or `x E` if turned.

    Args:
        expr: a matrix `(out, in)`.
        x: features: `in` of them, or `out` if turned.
        on: what to do it with.

    Raises:
        NotFactorableError: there is no such form.
    """
    generated = None if turned else parts_of(expr)
    if generated is not None:
        return on.generated(apply(generated.core, x, on), generated)
    match expr:
        case Permute(x=inner):
            return apply(inner, x, on, not turned)
        case MatMul(a=a, b=b):
            first, second = (a, b) if turned else (b, a)
            return apply(second, apply(first, x, on, turned), on, turned)
        case Add(a=a, b=b) if a.shape == b.shape == expr.shape:
            return on.added(apply(a, x, on, turned), apply(b, x, on, turned))
        case Mul(a=a, b=b) if a.shape == expr.shape:
            return _scaled(a, b, x, on, turned)
        case Cat(xs=parts, dim=dim) if len(expr.shape) == 2:
            if dim == int(turned):
                return on.joined([apply(p, x, on, turned) for p in parts])
            pieces = on.parted(x, [p.shape[dim] for p in parts])
            terms = [apply(p, v, on, turned) for p, v in zip(parts, pieces, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = on.added(total, term)
            return total
        case Ref() | Slice() | Reshape() if len(expr.shape) == 2 and _is_stored(expr):
            return on.product(x, expr, turned)
    raise NotFactorableError


def _scaled(matrix: Expr, vector: Expr, x: V, on: Operations[V], turned: bool) -> V:
    rows, columns = matrix.shape
    if not _is_stored(vector) or vector.shape not in ((rows, 1), (1, columns), (1, 1)):
        raise NotFactorableError
    of_rows = vector.shape == (rows, 1)
    # The scale of what is read comes first, that of what is written last, as does a number's.
    if of_rows == turned and vector.shape != (1, 1):
        return apply(matrix, on.scaled(x, vector), on, turned)
    return on.scaled(apply(matrix, x, on, turned), vector)


def _is_stored(expr: Expr) -> bool:
    return all(isinstance(node, Ref | Slice | Reshape) for node in expr.walk())


def multiplications(expr: Expr) -> int | None:
    """Of `apply`, for each row of features; None if the expression has to be made."""
    counter = _Counter()
    try:
        apply(matrix_of(expr), expr.shape[1], counter)
    except NotFactorableError:
        return None
    return counter.total


def never_materialized(expr: Expr) -> bool:
    """Whether a weight has a generated part and can be applied, so that its layer never makes it.

    Made, it takes `out * in * groups * width` numbers more in memory, and as many again for its
    gradient; applied, a few hundredths of the multiplications that its base takes.
    """
    generated = any(parts_of(node) is not None for node in expr.walk())
    return generated and multiplications(expr) is not None


def is_turned(expr: Expr) -> bool:
    """Whether `apply` reads a stored matrix the other way round, as `x M`.

    Raises:
        NotFactorableError: the expression has to be made.
    """
    counter = _Counter()
    apply(matrix_of(expr), expr.shape[1], counter)
    return counter.turned


class _Counter:
    """Operations on the number of features."""

    def __init__(self) -> None:
        self.total, self.turned = 0, False

    def product(self, x: int, matrix: Expr, turned: bool) -> int:
        del x
        self.total += math.prod(matrix.shape)
        self.turned |= turned
        return matrix.shape[1 if turned else 0]

    def scaled(self, x: int, vector: Expr) -> int:
        self.total += math.prod(vector.shape)
        return x

    def added(self, a: int, b: int) -> int:
        del b
        return a

    def joined(self, parts: Sequence[int]) -> int:
        return sum(parts)

    def parted(self, x: int, sizes: Sequence[int]) -> list[int]:
        del x
        return list(sizes)

    def generated(self, x: int, parts: Generated) -> int:
        del x
        self.total += parts.multiplications
        return parts.outputs
