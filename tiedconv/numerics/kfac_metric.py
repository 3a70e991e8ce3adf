"""What an error of a weight costs, measured on images.

For a matrix W `(out, in)` replaced by `W + E`, the cost is

    cost(E) = 1/2 tr(G E C E^T)

with C `(in, in)` the second moment of what W reads and G `(out, out)` that of the loss gradient
of what it writes. It is the Kronecker-factored form of the Fisher matrix (K-FAC; Martens and
Grosse, arXiv 1503.05671): to second order the divergence, in nats for each image, of the changed
network's answers from the original's. So costs of different layers are in one unit and may be
added, and a budget is spent where it buys most. With G the identity it is the whitened error of
SVD-LLM (arXiv 2403.07378); with both, the squared Frobenius error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.numerics.linalg import truncate


@dataclass(frozen=True)
class KfacMetric:
    """The two moments of one matrix, positive definite; None stands for the identity.

    Args:
        left: G `(out, out)`.
        right: C `(in, in)`.
    """

    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def measured(self) -> bool:
        """Whether there is more to it than plain distance."""
        return self.left is not None or self.right is not None

    @property
    def weight(self) -> float:
        """The mean over entries of twice the cost of an error of 1 in that entry."""
        return _trace(self.left) * _trace(self.right)

    def flipped(self) -> KfacMetric:
        """The metric of the transposed matrix."""
        return KfacMetric(self.right, self.left)

    def apply(self, error: Tensor) -> Tensor:
        """`G E C`, half the gradient of twice the cost, `(out, in)`."""
        if self.right is not None:
            error = error @ self.right.to(error.dtype)
        return error if self.left is None else self.left.to(error.dtype) @ error

    def cost(self, error: Tensor) -> float:
        """`1/2 tr(G E C E^T)`."""
        return 0.5 * float((self.apply(error) * error).sum(dtype=torch.float64))

    def whiten(self, matrix: Tensor) -> Tensor:
        """The matrix whose squared Frobenius norm is twice the cost, `(out, in)`."""
        if self.right is not None:
            matrix = matrix @ _root(self.right, matrix.dtype)
        return matrix if self.left is None else _root(self.left, matrix.dtype).t() @ matrix

    def truncate(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The B `(out, rank)` and A `(rank, in)` with the least cost of `matrix - B A`."""
        b, a = truncate(self.whiten(matrix), rank)
        if self.left is not None:
            root = _root(self.left, b.dtype).t()
            b = torch.linalg.solve_triangular(root, b, upper=True)
        if self.right is not None:
            root = _root(self.right, a.dtype)
            a = torch.linalg.solve_triangular(root, a, upper=False, left=False)
        return _balanced(b, a)

    def scaled_left(self) -> Tensor | None:
        """G times the mean eigenvalue of C: the left side, where the right gets unit trace."""
        return None if self.left is None else self.left * _trace(self.right)

    def part(self, start: int, stop: int) -> KfacMetric:
        """The metric of some rows."""
        left = None if self.left is None else self.left[start:stop, start:stop]
        return KfacMetric(left, self.right)


IDENTITY = KfacMetric()


def mean_metric(metrics: Sequence[KfacMetric]) -> KfacMetric:
    """One metric in place of several: each side the mean, weighted by what the other side costs.

    The sides of a metric have no scale of their own (`c G` and `C / c` cost the same), so each
    side enters with unit trace and the whole keeps the sum of the costs of a random error.
    """
    lefts, rights, weights = [], [], []
    for metric in metrics:
        left, right = _trace(metric.left), _trace(metric.right)
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


def shrinkage_estimate(first: Tensor, second: Tensor) -> tuple[Tensor, float]:
    """A well-conditioned second moment from those of two halves of the images.

    `(1 - rho) C + rho mu I`, mu the mean eigenvalue. The ridge rho is chosen by the data: it is
    the one with which each half best predicts the other (least squares, in closed form), halved
    because both together see twice the images.

    Args:
        first, second: moments over the halves, `(n, n)` float64.

    Returns:
        the moment, float32, and rho.
    """
    whole = (first + second) / 2
    ridge = 0.0
    for mine, other in ((first, second), (second, first)):
        spread = mine.clone()
        spread.diagonal().sub_(float(mine.diagonal().mean()))
        ridge += float(((mine - other) * spread).sum() / spread.square().sum().clamp(min=1e-300))
    rho = min(1.0, max(1e-4, ridge / 4))
    mean = float(whole.diagonal().mean())
    whole = whole * (1 - rho)
    whole.diagonal().add_(rho * mean if mean > 0 else 1.0)
    return whole.float(), rho


def _root(moment: Tensor, dtype: torch.dtype) -> Tensor:
    """The lower triangular L with `L L^T` the moment."""
    root: Tensor = torch.linalg.cholesky(moment.double())
    return root.to(dtype)


def _trace(side: Tensor | None) -> float:
    return 1.0 if side is None else max(float(side.diagonal().mean()), 1e-30)


def _balanced(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with columns of B and rows of A of one norm."""
    over, under = b.norm(dim=0), a.norm(dim=1)
    scale = torch.where((over > 0) & (under > 0), (under / over.clamp(min=1e-30)).sqrt(), 1.0)
    return b * scale, a / scale.unsqueeze(1)
