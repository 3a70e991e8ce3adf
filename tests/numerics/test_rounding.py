"""Rounding with error feedback: it costs less than rounding each entry alone, and is exact data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiedconv.core.expr import MatMul, Ref
from tiedconv.numerics.factor_metric import factor_metric
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.least_squares import refit, total_cost
from tiedconv.numerics.rounding import (
    Rounded,
    Rounding,
    alike_inputs,
    entropy,
    gptq,
    in_bits,
    width_of,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moment(size: int, seed: int) -> Tensor:
    """A second moment with strong correlations."""
    x = normal(2 * size, size, seed=seed) @ normal(size, size, seed=seed + 1)
    return x.t() @ x / len(x) + 0.01 * torch.eye(size)


sizes = st.tuples(st.integers(2, 24), st.integers(2, 24))


@given(sizes, st.integers(0, 50), st.sampled_from([0.05, 0.2, 0.7]))
def test_each_value_is_a_whole_number_and_a_finer_step_costs_less(
    shape: tuple[int, int], seed: int, step: float
) -> None:
    matrix = normal(*shape, seed=seed)
    rounding = Rounding(matrix, KfacMetric(moment(shape[0], seed), moment(shape[1], seed + 9)))
    coarse, fine = rounding.at(step), rounding.at(step / 16)
    assert coarse.values.dtype == torch.int8
    assert coarse.matrix.shape == matrix.shape
    assert rounding.cost(fine) <= 1.3 * rounding.cost(coarse) + 1e-6


@pytest.mark.parametrize("sides", ["inputs", "both"])
def test_feedback_costs_less_than_rounding_each_entry_alone(sides: str) -> None:
    matrix, right = normal(32, 48), moment(48, 3)
    left = moment(32, 7) if sides == "both" else None
    metric = KfacMetric(left, right)
    rounded = Rounding(matrix, metric).at(1.5)
    alone = (matrix / rounded.rows / (1 if rounded.columns is None else rounded.columns)).round()
    unit = rounded.rows * (1 if rounded.columns is None else rounded.columns)
    ours = metric.cost(matrix - rounded.matrix)
    assert ours < 0.7 * metric.cost(matrix - alone * unit)


def test_one_step_costs_about_the_same_in_every_matrix() -> None:
    costs = []
    for scale in (0.01, 1.0, 100.0):
        metric = KfacMetric(None, moment(48, 3) * scale**2)
        costs.append(metric.cost(normal(32, 48) / scale - Rounding(normal(32, 48) / scale, metric)
                                 .at(0.3).matrix))  # fmt: skip
    assert max(costs) < 1.2 * min(costs)


def test_without_a_metric_it_is_rounding_to_nearest() -> None:
    matrix = normal(8, 16)
    rounded = Rounding(matrix, IDENTITY).at(0.25)
    assert rounded.columns is None
    assert torch.equal(rounded.values, (matrix / rounded.rows).round().to(torch.int8))


def test_scales_are_those_that_a_half_holds() -> None:
    rounded = Rounding(normal(256, 40), KfacMetric(moment(256, 1), moment(40, 2))).at(0.5)
    for scales in (rounded.rows, rounded.columns):
        assert scales is not None
        assert torch.equal(scales.half().float(), scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_integers_keep_to_a_width(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    values = Rounding(normal(8, 64), IDENTITY).at(1e-4, largest).values
    assert int(values.abs().max()) <= largest
    assert width_of(values, 2, bits) <= bits


def test_the_estimate_of_bits_is_near() -> None:
    rounding = Rounding(normal(64, 96), KfacMetric(None, moment(96, 3)))
    for step in (0.5, 2.0):
        values = rounding.at(step).values
        assert rounding.sample().bits(step) == pytest.approx(
            values.numel() * entropy(values), rel=0.1
        )


def test_gptq_leaves_later_columns_to_make_good_earlier_errors() -> None:
    feedback = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    ones = torch.ones(1, 2)
    target = torch.tensor([[0.4, 0.0]])
    # 0.4 rounds to 0; the error of 0.4 moves the next target to -0.4, which rounds to 0 as well.
    assert gptq(target, torch.ones(1, 1), ones, feedback, 7).tolist() == [[0, 0]]
    target = torch.tensor([[0.4, -0.3]])
    assert gptq(target, torch.ones(1, 1), ones, feedback, 7).tolist() == [[0, -1]]


@given(st.integers(0, 40))
def test_the_metric_of_a_factor_is_the_cost_of_its_errors(seed: int) -> None:
    b, a = normal(6, 3, seed=seed), normal(3, 8, seed=seed + 1)
    factors = {"B": b, "A": a}
    weights = [MatMul(Ref("B", (6, 3)), Ref("A", (3, 8)))]
    whole = KfacMetric(moment(6, seed), moment(8, seed + 2))
    for name in factors:
        error = 0.1 * normal(*factors[name].shape, seed=seed + 5)
        moved = {**factors, name: factors[name] + error}
        expected = total_cost(weights, moved, [b @ a], [whole])
        found = factor_metric(name, weights, factors, [whole]).cost(error)
        assert found == pytest.approx(expected, rel=1e-3)


@given(st.integers(0, 40))
def test_refitting_never_costs_more(seed: int) -> None:
    b, a = normal(6, 3, seed=seed), normal(3, 8, seed=seed + 1)
    weights = [MatMul(Ref("B", (6, 3)), Ref("A", (3, 8)))]
    whole = [KfacMetric(moment(6, seed), moment(8, seed + 2))]
    rounded = {"B": b, "A": a.round()}
    before = total_cost(weights, rounded, [b @ a], whole)
    found = refit(weights, rounded, [b @ a], whole, ["B"])
    assert torch.equal(found["A"], rounded["A"])
    assert total_cost(weights, found, [b @ a], whole) <= before


@given(st.integers(0, 50), st.sampled_from([4, 6, 8]))
def test_feedback_by_alike_inputs_rounds_kernels_better_than_nearest(seed: int, bits: int) -> None:
    kernels, alike = normal(64, 9, seed=seed), alike_inputs(9)
    near, fed = in_bits(kernels, bits), in_bits(kernels, bits, alike)
    largest = 2 ** (bits - 1)
    assert int(fed.values.abs().max()) <= largest
    assert torch.equal(near.rows, fed.rows)

    def cost(found: Rounded) -> float:
        off = (found.matrix - kernels).double()
        return float(torch.einsum("ri,ij,rj->", off, alike, off))

    assert cost(fed) < 0.8 * cost(near)
