"""Applying a weight to features factor by factor, without materialising the weight.

A linear layer needs `x W^T`, not W. By the algebra of `core.expr` the product goes factor by
factor: `x (B A)^T = (x A^T) B^T`, `x (base + R)^T = x base^T + x R^T`, a scale of rows scales the
result, concatenated rows concatenate results, rows of zeros give zeros, a generated weight
(see `generator`) takes the features through its core. So memory holds the stored tensors alone, and
low ranks save time too.

The rules are in `apply`; each backend (torch, an ONNX graph, a counter) implements `Operations`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from tiedconv.core.expr import (
    Add,
    Cat,
    Dequantize,
    Expr,
    MatMul,
    Mul,
    Permute,
    Ref,
    Reshape,
    Slice,
)
from tiedconv.core.pad import Pad
from tiedconv.runtime.generator import Generated, parts_of

V = TypeVar("V")


class NotFactorableError(Exception):
    """Not a product, sum or concatenation of stored matrices: the weight must be materialised."""


def require_values(are_patches: bool) -> None:
    """What only features in memory can do is refused for patches, which a kernel reads first.

    Raises:
        NotFactorableError: they are patches.
    """
    if are_patches:
        raise NotFactorableError


class Operations(Protocol[V]):
    """What `apply` needs of features, whose last dimension (or channels) it transforms."""

    def product(self, x: V, matrix: Expr, transpose: bool) -> V:
        """`x M^T`, or `x M` if `transpose`; M is a stored matrix, or a part of one."""

    def scale(self, x: V, vector: Expr) -> V:
        """Each feature times its value; the vector is `(n, 1)`, `(1, n)` or `(1, 1)`."""

    def add(self, a: V, b: V) -> V:
        """The sum."""

    def concat(self, parts: Sequence[V]) -> V:
        """The features of all parts, concatenated."""

    def split(self, x: V, sizes: Sequence[int]) -> list[V]:
        """The features, split into groups of these sizes."""

    def first(self, x: V, count: int) -> V:
        """The first `count` features."""

    def pad(self, x: V, count: int) -> V:
        """The features, and `count` zeros after them."""

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


def apply(expr: Expr, x: V, on: Operations[V], transpose: bool = False) -> V:
    """`x E^T`, or `x E` if `transpose`.

    Args:
        expr: a matrix `(out, in)`.
        x: features: `in` of them, or `out` if `transpose`.
        on: the operations of the backend.

    Raises:
        NotFactorableError: the weight must be materialised.
    """
    generated = None if transpose else parts_of(expr)
    if generated is not None:
        return on.generated(apply(generated.core, x, on), generated)
    match expr:
        case Permute(x=inner):
            return apply(inner, x, on, not transpose)
        case MatMul(a=a, b=b):
            first, second = (a, b) if transpose else (b, a)
            return apply(second, apply(first, x, on, transpose), on, transpose)
        case Add(a=a, b=b) if a.shape == b.shape == expr.shape:
            return on.add(apply(a, x, on, transpose), apply(b, x, on, transpose))
        case Mul(a=a, b=b) if a.shape == expr.shape:
            return _scaled(a, b, x, on, transpose)
        case Cat(xs=parts, dim=dim) if len(expr.shape) == 2:
            if dim == int(transpose):
                return on.concat(_side_by_side(parts, x, on, transpose))
            pieces = on.split(x, [p.shape[dim] for p in parts])
            return _summed(parts, pieces, on, transpose)
        case Pad(x=inner, dim=dim, size=size) if len(expr.shape) == 2:
            if dim == int(transpose):
                return on.pad(apply(inner, x, on, transpose), size - inner.shape[dim])
            return apply(inner, on.first(x, inner.shape[dim]), on, transpose)
        case Ref() | Slice() | Reshape() | Dequantize() if len(expr.shape) == 2 and is_stored(expr):
            return on.product(x, expr, transpose)
    raise NotFactorableError


def _side_by_side(parts: Sequence[Expr], x: V, on: Operations[V], transpose: bool) -> list[V]:
    """The features by each part; a factor that products share is multiplied once."""
    shared: dict[Expr, V] = {}
    found: list[V] = []
    for part in parts:
        if isinstance(part, MatMul):
            first, second = (part.a, part.b) if transpose else (part.b, part.a)
            if first not in shared:
                shared[first] = apply(first, x, on, transpose)
            found.append(apply(second, shared[first], on, transpose))
        else:
            found.append(apply(part, x, on, transpose))
    return found


def _summed(parts: Sequence[Expr], pieces: Sequence[V], on: Operations[V], transpose: bool) -> V:
    """The sum of all features by their parts; a factor that products end with is applied once."""
    sums: dict[Expr | None, V] = {}
    for part, x in zip(parts, pieces, strict=True):
        last: Expr | None = None
        first = part
        if isinstance(part, MatMul):
            first, last = (part.a, part.b) if transpose else (part.b, part.a)
        term = apply(first, x, on, transpose)
        sums[last] = on.add(sums[last], term) if last in sums else term
    terms = [x if e is None else apply(e, x, on, transpose) for e, x in sums.items()]
    total = terms[0]
    for term in terms[1:]:
        total = on.add(total, term)
    return total


def _scaled(matrix: Expr, vector: Expr, x: V, on: Operations[V], transpose: bool) -> V:
    rows, columns = matrix.shape
    if not is_stored(vector) or vector.shape not in ((rows, 1), (1, columns), (1, 1)):
        raise NotFactorableError
    of_rows = vector.shape == (rows, 1)
    # A scale of the inputs comes first; a scale of the outputs, or a scalar, comes last.
    if of_rows == transpose and vector.shape != (1, 1):
        return apply(matrix, on.scale(x, vector), on, transpose)
    return on.scale(apply(matrix, x, on, transpose), vector)


def is_stored(expr: Expr) -> bool:
    """Whether a matrix is read rather than computed: a stored one, or a part of one."""
    return all(isinstance(node, Ref | Slice | Reshape | Dequantize) for node in expr.walk())
