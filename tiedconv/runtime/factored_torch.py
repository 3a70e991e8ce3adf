"""The operations of `runtime.factored` in torch: features in the last dimension of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedconv.core.expr import Expr, Lookup
from tiedconv.runtime.factored import apply, matrix_of
from tiedconv.runtime.generator import Generated


def linear(expr: Expr, x: Tensor, lookup: Lookup) -> Tensor:
    """`x W^T` by the factors of W.

    Args:
        expr: of W, `(out, in)`.
        x: `(..., in)`.
        lookup: gives the stored tensor of a name.

    Raises:
        NotFactorableError: W must be materialised.
    """
    return apply(matrix_of(expr), x, Features(lambda part: part.evaluate(lookup)))


class Features:
    """Products with features in the last dimension.

    Args:
        evaluate: gives the value of a stored matrix, or of a part of one.
    """

    def __init__(self, evaluate: Callable[[Expr], Tensor]) -> None:
        self.evaluate = evaluate

    def product(self, x: Tensor, matrix: Expr, transpose: bool) -> Tensor:
        """`x M^T`, or `x M` if `transpose`."""
        stored = self.evaluate(matrix)
        return x @ stored if transpose else F.linear(x, stored)

    def scale(self, x: Tensor, vector: Expr) -> Tensor:
        """Each feature times its value."""
        return x * self.evaluate(vector).reshape(-1)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        return a + b

    def concat(self, parts: Sequence[Tensor]) -> Tensor:
        """The features of all parts, concatenated."""
        return torch.cat(list(parts), dim=-1)

    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The features, split into groups."""
        return list(torch.split(x, list(sizes), dim=-1))

    def first(self, x: Tensor, count: int) -> Tensor:
        """The first features."""
        return x[..., :count]

    def pad(self, x: Tensor, count: int) -> Tensor:
        """The features, and zeros after them."""
        return F.pad(x, (0, count))

    def generated(self, x: Tensor, parts: Generated) -> Tensor:
        """`sum_k B_k^g X_k A_k^g`, where x is `(..., terms * r * s)`."""
        (terms, r, s), n = parts.inner, math.prod(x.shape[:-1])
        groups, _, out, _ = parts.left.shape
        # Large products of few matrices rather than one small product for each row: B from the
        # left for all rows of a term, then A from the right for all terms of a group.
        rows = x.reshape(n, terms, r, s).permute(1, 0, 3, 2).reshape(terms, n * s, r)
        left = self.evaluate(parts.left).reshape(groups * out, terms, r).permute(1, 2, 0)
        inner = torch.bmm(rows, left).reshape(terms, n, s, groups, out)
        inner = inner.permute(3, 1, 4, 0, 2).reshape(groups, n * out, terms * s)
        product = torch.bmm(inner, self.evaluate(parts.right).reshape(groups, terms * s, -1))
        product = product.reshape(groups, n, out, parts.right.shape[-1]).transpose(0, 1)
        return product.reshape(*x.shape[:-1], parts.outputs)
