"""Which hidden units are kept, against the definition of their cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.numerics.unit_selection import (
    AT_ONCE,
    decreasing,
    order_by_loss,
    order_by_losses,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, seed: int) -> Tensor:
    rows = randn(3 * size, size, seed=seed)
    return rows.t() @ rows / (3 * size)


def loss(matrix: Tensor, metric: KfacMetric, kept: list[int]) -> float:
    """The cost of the best matrix that reads some columns alone, by the normal equations."""
    c = torch.eye(matrix.shape[1]).double() if metric.right is None else metric.right
    own = torch.linalg.solve(c[kept][:, kept], c[kept] @ matrix.t()).t()
    error = matrix.clone()
    error[:, kept] -= own
    return metric.cost(error)


def columns(units: list[int], size: int) -> list[int]:
    return [u * size + i for u in units for i in range(size)]


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("measured", ["both", "left", "right", "none"])
def test_each_unit_removed_is_the_one_that_costs_least(size: int, measured: str) -> None:
    units = 7
    matrix = randn(5, units * size)
    left = moment(5, 1) if measured in ("both", "left") else None
    right = moment(units * size, 2) if measured in ("both", "right") else None
    metric = KfacMetric(left, right)
    order = order_by_loss(matrix, metric, size).tolist()
    assert sorted(order) == list(range(units))
    for count in range(units, 1, -1):
        kept = order[:count]
        after = {
            u: loss(matrix, metric, columns([k for k in kept if k != u], size)) for u in kept
        }  # fmt: skip
        assert after[order[count - 1]] == pytest.approx(min(after.values()))


def test_losses_of_several_readers_add_up() -> None:
    """As those of the matrix that projects and of the one that squeezes."""
    units = 7
    readers = [
        (randn(5, units), KfacMetric(moment(5, 1), moment(units, 2))),
        (randn(3, units * 2, seed=3), KfacMetric(None, moment(units * 2, 4))),
    ]
    order = order_by_losses(readers, units).tolist()
    for count in range(units, 1, -1):
        kept = order[:count]
        after = {}
        for u in kept:
            rest = [k for k in kept if k != u]
            after[u] = sum(loss(*r, columns(rest, r[0].shape[1] // units)) for r in readers)
        assert after[order[count - 1]] == pytest.approx(min(after.values()))


def test_the_first_columns_are_the_best_that_read_these_alone() -> None:
    matrix, metric = randn(5, 12), KfacMetric(moment(5, 1), moment(12, 2))
    for count in (1, 5, 12):
        own = metric.onto_first_columns(matrix, count)
        error = matrix.clone()
        error[:, :count] -= own
        assert metric.cost(error) == pytest.approx(loss(matrix, metric, list(range(count))))
    assert torch.equal(KfacMetric().onto_first_columns(matrix, 3), matrix[:, :3])


def test_a_copy_of_a_unit_is_removed_first_however_large_its_weights() -> None:
    hidden, matrix = randn(500, 6), randn(4, 6)
    hidden[:, 3] = hidden[:, 1]
    matrix[:, 3] *= 100
    c = hidden.t() @ hidden / 500 + 1e-6 * torch.eye(6)
    order = order_by_loss(matrix, KfacMetric(None, c))
    assert order[-1] in (1, 3)
    kept = [u for u in range(6) if u != order[-1]]
    assert loss(matrix, KfacMetric(None, c), kept) < 1e-3


def test_many_units_are_removed_several_at_a_time_and_close_to_one_by_one() -> None:
    units = 2 * AT_ONCE + 10
    matrix, metric = randn(20, units), KfacMetric(None, moment(units, 2))
    order = order_by_loss(matrix, metric).tolist()
    assert sorted(order) == list(range(units))
    half = units // 2
    drawn = torch.randperm(units, generator=torch.Generator().manual_seed(0)).tolist()
    assert loss(matrix, metric, order[:half]) < 0.75 * loss(matrix, metric, drawn[:half])


def test_gains_that_rise_are_pooled() -> None:
    for seed in range(5):
        gains = randn(30, seed=seed).abs()
        pooled = decreasing(gains)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(pooled.tolist()))
        assert float(pooled.sum()) == pytest.approx(float(gains.sum()))
        # The cost left is never said to be less than on the curve's convex hull, nor above it.
        assert bool((pooled.cumsum(0) >= gains.cumsum(0) - 1e-9).all())
    falling = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    assert torch.equal(decreasing(falling), falling)
