"""Fisher-weighted error of a weight matrix, Kronecker-factored (K-FAC).

For a matrix W `(out, in)` replaced by `W + E`, the cost is

    cost(E) = 1/2 tr(G E C E^T)

with C `(in, in)` the second moment of the inputs of W and G `(out, out)` that of the loss gradient
with respect to its outputs: the Kronecker-factored Fisher matrix (Martens and Grosse,
https://arxiv.org/abs/1503.05671). To second order the cost is the KL divergence, in nats per image,
between the outputs of the original network and those of the changed one. Costs of different layers
are therefore in one unit: they can be added, and a budget goes where it removes the most. With G
the identity it is the whitened error of SVD-LLM (https://arxiv.org/abs/2403.07378); with G and C
the identity, half the squared Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tiedconv.numerics.linalg import cholesky, truncate

# Cholesky roots kept for reuse, of all metrics together. The candidates for one block use the same
# roots one after another; the roots of a whole model would take as much memory as its moments.
MAX_ROOT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class KfacMetric:
    """The two second moments of one matrix, positive definite; None stands for the identity.

    The moments must not be changed in place: their Cholesky roots are reused.

    Args:
        left: G `(out, out)`.
        right: C `(in, in)`.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @cached_property
    def _left_root(self) -> _Root | None:
        return None if self.left is None else _Root(self.left)

    @cached_property
    def _right_root(self) -> _Root | None:
        return None if self.right is None else _Root(self.right)

    @cached_property
    def _parts(self) -> dict[tuple[int, int], KfacMetric]:
        return {}

    @property
    def measured(self) -> bool:
        """Whether it differs from the Frobenius norm."""
        return self.left is not None or self.right is not None

    @property
    def weight(self) -> float:
        """The mean over entries of twice the cost of an error of 1 in that entry."""
        return _mean_eigenvalue(self.left) * _mean_eigenvalue(self.right)

    def flipped(self) -> KfacMetric:
        """The metric of the transposed matrix."""
        return self._flipped

    @cached_property
    def _flipped(self) -> KfacMetric:
        flipped = KfacMetric(self.right, self.left)
        vars(flipped).update(_left_root=self._right_root, _right_root=self._left_root)
        return flipped

    def apply(self, error: Tensor) -> Tensor:
        """`G E C`, the gradient of the cost, `(out, in)`."""
        if self.right is not None:
            error = error @ self.right.to(error.dtype)
        return error if self.left is None else self.left.to(error.dtype) @ error

    def cost(self, error: Tensor) -> float:
        """`1/2 tr(G E C E^T)`."""
        return 0.5 * float((self.apply(error) * error).sum(dtype=torch.float64))

    def whiten(self, matrix: Tensor) -> Tensor:
        """The matrix whose squared Frobenius norm is twice the cost, `(out, in)`."""
        if self._right_root is not None:
            matrix = matrix @ self._right_root.of(matrix.dtype)
        return matrix if self._left_root is None else self._left_root.of(matrix.dtype).t() @ matrix

    def truncate(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The B `(out, rank)` and A `(rank, in)` with the least cost of `matrix - B A`."""
        b, a = truncate(self.whiten(matrix), rank)
        if self._left_root is not None:
            root = self._left_root.of(b.dtype).t()
            b = torch.linalg.solve_triangular(root, b, upper=True)
        if self._right_root is not None:
            root = self._right_root.of(a.dtype)
            a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
        return _balanced(b, a)

    def scaled_left(self) -> Tensor | None:
        """G times the mean eigenvalue of C: the left side once C is scaled to mean eigenvalue 1."""
        return None if self.left is None else self.left * _mean_eigenvalue(self.right)

    def onto_first_columns(self, matrix: Tensor, count: int) -> Tensor:
        """The first `count` columns that leave the least cost, the others being zero.

        They make up for the others as far as the inputs depend on each other; G does not matter.

        Returns:
            `(out, count)`.
        """
        if self._right_root is None or count == matrix.shape[1]:
            return matrix[:, :count]
        root = self._right_root.of(torch.float64)
        own = matrix.double() @ root[:, :count]
        first: Tensor = torch.linalg.solve_triangular(
            root[:count, :count], own, upper=False, left=False
        )
        return first.to(matrix.dtype)

    def of_first_rows(self, count: int) -> KfacMetric:
        """The metric of errors of which those of the rows after the first `count` cost nothing."""
        if self.left is None:
            return self
        if count == len(self.left):
            return self
        left = torch.zeros_like(self.left)
        left[:count, :count] = self.left[:count, :count]
        return self._beside(KfacMetric(left, self.right))

    def reordered(self, rows: Tensor | None = None, columns: Tensor | None = None) -> KfacMetric:
        """The metric of a matrix whose rows or columns were put into this order."""

        def moved(side: Tensor | None, order: Tensor | None) -> Tensor | None:
            return side if side is None or order is None else side[order][:, order]

        return KfacMetric(moved(self.left, rows), moved(self.right, columns))

    def _beside(self, other: KfacMetric) -> KfacMetric:
        """A metric with the same C, whose root is computed once."""
        vars(other).update(_right_root=self._right_root)
        return other

    def part(self, start: int, stop: int) -> KfacMetric:
        """The metric of rows `start` to `stop`."""
        if self.left is None or (start, stop) == (0, len(self.left)):
            return self
        if (start, stop) not in self._parts:
            part = KfacMetric(self.left[start:stop, start:stop], self.right)
            self._parts[start, stop] = self._beside(part)
        return self._parts[start, stop]


class _Root:
    """The lower triangular L with `L L^T` a moment: computed when used, kept while recent."""

    def __init__(self, moment: Tensor) -> None:
        self._moment = moment
        self._by_dtype: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype) -> Tensor:
        """L, computed in float64 and rounded to `dtype`."""
        if dtype not in self._by_dtype:
            self._by_dtype[dtype] = cholesky(self._moment).to(dtype)
        root = self._by_dtype[dtype]
        _recent.pop(self, None)
        _recent[self] = sum(r.nbytes for r in self._by_dtype.values())
        while sum(_recent.values()) > MAX_ROOT_BYTES:
            oldest = next(_recent.keys())
            oldest._by_dtype.clear()
            del _recent[oldest]
        return root


# Bytes of each kept root, least recently used first. Weak: a root goes with its metric.
_recent: WeakKeyDictionary[_Root, int] = WeakKeyDictionary()


IDENTITY = KfacMetric()


def mean_metric(metrics: Sequence[KfacMetric]) -> KfacMetric:
    """One metric in place of several: each side the weighted mean of theirs.

    The scale of one side is arbitrary (`c G` and `C / c` give the same cost), so each side enters
    scaled to mean eigenvalue 1, weighted by the `weight` of its metric. The result costs a random
    error as much as all of them together. A side that one of them lacks, or that comes in several
    sizes, is None.
    """
    lefts, rights, weights = [], [], []
    for metric in metrics:
        left, right = _mean_eigenvalue(metric.left), _mean_eigenvalue(metric.right)
        weights.append(metric.weight)
        lefts.append(None if metric.left is None else metric.left / left)
        rights.append(None if metric.right is None else metric.right / right)
    total = sum(weights)

    def mean(sides: Sequence[Tensor | None], scale: float) -> Tensor | None:
        known = [(w, s) for w, s in zip(weights, sides, strict=True) if s is not None]
        if len(known) < len(sides) or len({s.shape for _, s in known}) > 1:
            return None
        return sum(w * s for w, s in known) * scale / total  # type: ignore[return-value]

    left_mean = mean(lefts, total)
    return KfacMetric(left_mean, mean(rights, total if left_mean is None else 1.0))


def shrinkage_estimate(first: Tensor, second: Tensor, least: float = 0.0) -> tuple[Tensor, float]:
    """A well-conditioned second moment from those of two halves of the images.

    `(1 - rho) C + rho mu I`, mu the mean eigenvalue. The ridge rho is chosen by the data: it is
    the one with which each half best predicts the other (least squares, in closed form), halved
    because the result is over twice as many images.

    Args:
        first, second: moments over the halves, `(n, n)` float64.
        least: of the ridge, which is 1e-4 or more in any case.

    Returns:
        the moment, float32, and rho.
    """
    whole = (first + second) / 2
    ridge = 0.0
    for mine, other in ((first, second), (second, first)):
        spread = mine.clone()
        spread.diagonal().sub_(float(mine.diagonal().mean()))
        ridge += float(((mine - other) * spread).sum() / spread.square().sum().clamp(min=1e-300))
    rho = min(1.0, max(1e-4, least, ridge / 4))
    mean = float(whole.diagonal().mean())
    whole = whole * (1 - rho)
    whole.diagonal().add_(rho * mean if mean > 0 else 1.0)
    return whole.float(), rho


def _mean_eigenvalue(side: Tensor | None) -> float:
    return 1.0 if side is None else max(float(side.diagonal().mean()), 1e-30)


def _balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product where each column of B has the norm of its row of A."""
    over, under = b.norm(dim=0), a.norm(dim=1)
    scale = torch.where((over > 0) & (under > 0), (under / over.clamp(min=1e-30)).sqrt(), 1.0)
    return b * scale, a / scale.unsqueeze(1)
