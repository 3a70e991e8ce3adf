"""Multiplications of an expression, counted on shapes: no tensor is needed.

Three figures: what applying the factors to one row of features takes (`apply_flops`), what
computing the weight takes (`materialize_flops`), and what evaluating any well-formed expression
takes, values written included (`eval_flops`, by which files are bounded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tiedconv.core.expr import Add, Cat, Dequantize, Expr, MatMul, Mul, Reshape
from tiedconv.core.pad import Pad
from tiedconv.runtime.factored import NotFactorableError, apply, matrix_of
from tiedconv.runtime.generator import Generated, parts_of


def apply_flops(expr: Expr) -> int | None:
    """Multiplications of `factored.apply` for each row of features.

    Returns:
        None if the weight must be materialised.
    """
    counter = _counted(expr)
    return None if counter is None else counter.total


def eval_flops(expr: Expr) -> tuple[int, int]:
    """Values written while evaluating, the result included, and multiplications of the products."""
    written = products = 0
    for node in expr.walk():
        if isinstance(node, Add | Cat | Dequantize | MatMul | Mul | Pad | Reshape):
            written += math.prod(node.shape)
        if isinstance(node, MatMul):
            products += math.prod(node.shape) * node.a.shape[-1]
    return written, products


def materialize_flops(expr: Expr) -> int:
    """Multiplications that computing a weight takes; a value moved or added counts as one."""
    moved = (n.shape for n in expr.walk() if n.children and not isinstance(n, MatMul))
    return eval_flops(expr)[1] + sum(map(math.prod, moved))


def never_materialized(expr: Expr) -> bool:
    """Whether a weight has a generated part and can be applied: its layer never materialises it.

    Materialised, it takes `out * in * groups * width` values more in memory, and as many again for
    its gradient; applied, a few hundredths of the multiplications that its base takes.
    """
    generated = any(parts_of(node) is not None for node in expr.walk())
    return generated and apply_flops(expr) is not None


def reads_transposed(expr: Expr) -> bool:
    """Whether `factored.apply` reads a stored matrix as `x M` rather than `x M^T`.

    Raises:
        NotFactorableError: the weight must be materialised.
    """
    counter = _counted(expr)
    if counter is None:
        raise NotFactorableError
    return counter.transposes


def _counted(expr: Expr) -> _Counter | None:
    counter = _Counter()
    try:
        apply(matrix_of(expr), expr.shape[1], counter)
    except NotFactorableError:
        return None
    return counter


class _Counter:
    """Operations on the number of features."""

    def __init__(self) -> None:
        self.total, self.transposes = 0, False

    def product(self, x: int, matrix: Expr, transpose: bool) -> int:
        del x
        self.total += math.prod(matrix.shape)
        self.transposes |= transpose
        return matrix.shape[1 if transpose else 0]

    def scale(self, x: int, vector: Expr) -> int:
        self.total += math.prod(vector.shape)
        return x

    def add(self, a: int, b: int) -> int:
        del b
        return a

    def concat(self, parts: Sequence[int]) -> int:
        return sum(parts)

    def split(self, x: int, sizes: Sequence[int]) -> list[int]:
        del x
        return list(sizes)

    def first(self, x: int, count: int) -> int:
        del x
        return count

    def pad(self, x: int, count: int) -> int:
        return x + count

    def generated(self, x: int, parts: Generated) -> int:
        del x
        self.total += parts.flops
        return parts.outputs
