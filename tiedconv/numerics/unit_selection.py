"""Which hidden units matter, once the others are made up for.

Let a matrix M read units with second moment C, and let errors of what it writes cost G (see
`kfac_metric`). With some units S kept and the columns of M fitted again in closed form, the cost is

    1/2 tr(G M (C - C_:S C_SS^-1 C_S:) M^T),     M' = M C_:S C_SS^-1

the reconstruction by ridge regression of CORP (arXiv 2602.05243); C holds the ridge already. Units
are removed from the back: each time those whose removal raises that cost least, in closed form by
the inverse of the moment, as Optimal Brain Surgeon does (Hassibi et al., 1993).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.numerics.linalg import cholesky

AT_ONCE = 16
"""One of so many units is removed at a time, those that matter least; of fewer, one by one."""


def order_by_loss(matrix: Tensor, metric: KfacMetric, size: int = 1) -> Tensor:
    """The units of a matrix's input, `(units,)`, the one that is removed last first.

    Args:
        matrix: `(out, units * size)`.
        metric: what its errors cost.
        size: columns of each unit: the area of a kernel, the width of a head.
    """
    return order_by_losses([(matrix, metric)], matrix.shape[1] // size)


def order_by_losses(readers: Sequence[tuple[Tensor, KfacMetric]], units: int) -> Tensor:
    """The same where several matrices read the units: their costs are added.

    Args:
        readers: each `(out, units * size)`, with the metric of its errors.
        units: their number.
    """
    parts = []
    for matrix, metric in readers:
        weights = KfacMetric(metric.left).whiten(matrix.double())
        moment = torch.eye(matrix.shape[1]) if metric.right is None else metric.right
        parts.append((weights, torch.cholesky_inverse(cholesky(moment))))
    sizes = [matrix.shape[1] // units for matrix, _ in readers]
    left = torch.arange(units)
    removed: list[Tensor] = []
    while len(left) > 1:
        losses = torch.stack(
            [_losses(*part, size) for part, size in zip(parts, sizes, strict=True)]
        ).sum(0)
        last = losses.argsort(stable=True)[: max(1, len(left) // AT_ONCE)]
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[last] = False
        parts = [
            _without(*part, stays.repeat_interleave(size))
            for part, size in zip(parts, sizes, strict=True)
        ]
        removed.append(left[last])
        left = left[stays]
    return torch.cat([*removed, left]).flip(0)


def _losses(weights: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Twice the cost of removing each unit, the others making up for it."""
    if size == 1:
        return weights.square().sum(0) / inverse.diagonal()
    units = weights.shape[1] // size
    blocks = inverse.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    own = weights.reshape(-1, units, size).permute(1, 2, 0)
    whitened: Tensor = torch.linalg.solve_triangular(
        torch.linalg.cholesky(blocks), own, upper=False
    )
    return whitened.square().sum((1, 2))


def _without(weights: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """The weights fitted again, and the inverse moment, of the columns that stay."""
    gone = ~stays
    across = inverse[gone][:, stays]
    solved = torch.cholesky_solve(across, torch.linalg.cholesky(inverse[gone][:, gone]))
    weights = torch.addmm(weights[:, stays], weights[:, gone], solved, alpha=-1)
    return weights, torch.addmm(inverse[stays][:, stays], across.t(), solved, alpha=-1)


def decreasing(gains: Tensor) -> Tensor:
    """The gains of the best convex curve below: neighbours that rise are given their mean."""
    pools: list[tuple[float, int]] = []
    for gain in gains.tolist():
        total, count = gain, 1
        while pools and pools[-1][0] * count < total * pools[-1][1]:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    means = torch.tensor([total / count for total, count in pools], dtype=torch.float64)
    return means.repeat_interleave(torch.tensor([count for _, count in pools]))
