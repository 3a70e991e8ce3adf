"""The operations of `tiedconv.applied` in torch: features in the last dimension of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedconv.applied import apply, matrix_of
from tiedconv.expr import Expr, Lookup
from tiedconv.generated import Generated


def linear(expr: Expr, x: Tensor, lookup: Lookup) -> Tensor:
    """`x W^T` by the factors of W.

    Args:
        expr: of W, `(out, in)`.
        x: `(..., in)`.
        lookup: gives the stored tensor of a name.

    Raises:
        CantApplyError: W has to be made.
    """
    return apply(matrix_of(expr), x, Features(lambda part: part.evaluate(lookup)))


class Features:
    """Products with features in the last dimension.

    Args:
        evaluate: gives the value of a stored matrix, or of a part of one.
    """

    def __init__(self, evaluate: Callable[[Expr], Tensor]) -> None:
        self.evaluate = evaluate

    def product(self, x: Tensor, matrix: Expr, turned: bool) -> Tensor:
        """`x M^T`, or `x M` if turned."""
        stored = self.evaluate(matrix)
        return x @ stored if turned else F.linear(x, stored)

    def scaled(self, x: Tensor, vector: Expr) -> Tensor:
        """Each feature times its number."""
        return x * self.evaluate(vector).reshape(-1)

    def added(self, a: Tensor, b: Tensor) -> Tensor:
        """The sum."""
        return a + b

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Features one after another."""
        return torch.cat(list(parts), dim=-1)

    def parted(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Features in groups."""
        return list(torch.split(x, list(sizes), dim=-1))

    def generated(self, x: Tensor, parts: Generated) -> Tensor:
        """`sum_k B_k^g X_k A_k^g`, where x is `(..., terms * r * s)`."""
        terms, r, s = parts.inner
        # Rows of features stand where the weight itself has the width of its query.
        rows = math.prod(x.shape[:-1])
        made = x.reshape(1, rows, terms, r, s) @ self.evaluate(parts.right)
        made = self.evaluate(parts.left) @ made.flatten(2, 3)
        return made.transpose(0, 1).reshape(*x.shape[:-1], parts.outputs)
