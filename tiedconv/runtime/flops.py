"""Multiplications of an expression, counted on shapes: no tensor is needed.

Four figures: what applying the factors to one row of features takes, scales included
(`apply_flops`), the multiply-adds of a row in the form that takes fewest (`fewest_macs`), what
computing the weight takes (`materialize_flops`), and what evaluating any well-formed expression
takes, values written included (`eval_flops`, by which files are bounded).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiedconv.core.expr import Add, Cat, Dequantize, Expr, MatMul, Mul, Reshape
from tiedconv.core.pad import Pad
from tiedconv.runtime.factored import NotFactorableError, apply, matrix_of, require_values
from tiedconv.runtime.generator import Generated, parts_of


def apply_flops(expr: Expr) -> int | None:
    """Multiplications of `factored.apply` for each row of features.

    Returns:
        None if the weight must be materialised.
    """
    counter = _counted(expr)
    return None if counter is None else counter.total


def apply_macs(expr: Expr) -> int | None:
    """Multiply-adds of the products alone of `factored.apply`, for each row of features.

    Returns:
        None if the weight must be materialised.
    """
    counter = _counted(expr)
    return None if counter is None else counter.products


def fewest_macs(expr: Expr) -> tuple[int, bool]:
    """Multiply-adds for each row of features, and whether factors are applied for it.

    Factors are applied where that takes fewer than the weight does, and where the weight is never
    materialised at all.
    """
    whole, applied = math.prod(expr.shape), apply_macs(expr)
    if applied is None or not (applied < whole or never_materialized(expr)):
        return whole, False
    return applied, True


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
    matrix_like = math.prod(expr.shape[2:]) == 1
    try:
        apply(matrix_of(expr), _Given(math.prod(expr.shape[1:]), not matrix_like), counter)
    except NotFactorableError:
        return None
    return counter


@dataclass(frozen=True)
class _Given:
    """The number of features, and whether they are patches that a kernel has yet to read."""

    count: int
    patches: bool = False


class _Counter:
    """Operations on the number of features.

    Patches are not in memory: the first product reads them, as a convolution does.
    """

    def __init__(self) -> None:
        self.total, self.products, self.transposes = 0, 0, False

    def product(self, x: _Given, matrix: Expr, transpose: bool) -> _Given:
        require_values(x.patches and transpose)
        self.total += math.prod(matrix.shape)
        self.products += math.prod(matrix.shape)
        self.transposes |= transpose
        return _Given(matrix.shape[1 if transpose else 0])

    def scale(self, x: _Given, vector: Expr) -> _Given:
        require_values(x.patches)
        self.total += math.prod(vector.shape)
        return x

    def add(self, a: _Given, b: _Given) -> _Given:
        del b
        return a

    def concat(self, parts: Sequence[_Given]) -> _Given:
        return _Given(sum(part.count for part in parts))

    def split(self, x: _Given, sizes: Sequence[int]) -> list[_Given]:
        require_values(x.patches)
        return [_Given(size) for size in sizes]

    def first(self, x: _Given, count: int) -> _Given:
        require_values(x.patches)
        return _Given(count)

    def pad(self, x: _Given, count: int) -> _Given:
        return _Given(x.count + count)

    def generated(self, x: _Given, parts: Generated) -> _Given:
        del x
        self.total += parts.flops
        self.products += parts.flops
        return _Given(parts.outputs)
