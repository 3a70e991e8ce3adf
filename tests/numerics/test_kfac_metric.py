"""What an error costs, against explicit sums and Kronecker products."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiedconv.numerics import kfac_metric
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric, mean_metric, shrinkage_estimate
from tiedconv.numerics.linalg import truncate

SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 7))
SEEDS = st.integers(0, 20)
SIDES = st.sampled_from(["both", "left", "right", "none"])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """A positive definite matrix whose eigenvalues span about `10^spread`."""
    q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    values = 10.0 ** (-spread * torch.linspace(0, 1, size, dtype=q.dtype))
    return (q * values) @ q.t() * (1 + seed % 3)


def metric_of(shape: tuple[int, int], sides: str = "both", seed: int = 0) -> KfacMetric:
    left = moment(shape[0], seed + 100) if sides in ("both", "left") else None
    right = moment(shape[1], seed + 200) if sides in ("both", "right") else None
    return KfacMetric(left, right)


def whole(metric: KfacMetric, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """G and C, written out where they are the identity."""
    out, inputs = shape
    left = torch.eye(out).double() if metric.left is None else metric.left
    return left, torch.eye(inputs).double() if metric.right is None else metric.right


@given(SHAPES, SIDES, SEEDS)
def test_cost_is_the_quadratic_form_of_the_kronecker_product(
    shape: tuple[int, int], sides: str, seed: int
) -> None:
    metric, error = metric_of(shape, sides, seed), randn(*shape, seed=seed)
    g, c = whole(metric, shape)
    long = error.flatten()
    by_kron = 0.5 * float(long @ torch.kron(g, c) @ long)
    by_einsum = 0.5 * float(torch.einsum("ij,jk,kl,il->", g, error, c, error))
    assert metric.cost(error) == pytest.approx(by_kron, rel=1e-9)
    assert metric.cost(error) == pytest.approx(by_einsum, rel=1e-9)
    assert IDENTITY.cost(error) == pytest.approx(0.5 * float(error.square().sum()))


@given(SHAPES, SIDES, SEEDS)
def test_apply_is_the_gradient_of_the_cost(shape: tuple[int, int], sides: str, seed: int) -> None:
    metric, error = metric_of(shape, sides, seed), randn(*shape, seed=seed).requires_grad_()
    g, c = whole(metric, shape)
    (0.5 * torch.trace(g @ error @ c @ error.t())).backward()
    assert error.grad is not None
    assert torch.allclose(metric.apply(error.detach()), error.grad, rtol=1e-9, atol=1e-12)


@given(SHAPES, SIDES, SEEDS)
def test_a_transposed_error_costs_the_same_in_the_flipped_metric(
    shape: tuple[int, int], sides: str, seed: int
) -> None:
    metric, error = metric_of(shape, sides, seed), randn(*shape, seed=seed)
    assert metric.flipped().cost(error.t()) == pytest.approx(metric.cost(error), rel=1e-9)


@given(SHAPES, SIDES, SEEDS, st.data())
def test_an_error_of_some_rows_costs_what_their_part_says(
    shape: tuple[int, int], sides: str, seed: int, data: st.DataObject
) -> None:
    metric, error = metric_of(shape, sides, seed), torch.zeros(shape).double()
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    error[start:stop] = randn(stop - start, shape[1], seed=seed)
    part = metric.part(start, stop)
    assert part.cost(error[start:stop]) == pytest.approx(metric.cost(error), rel=1e-9)


@given(SHAPES, SIDES, SEEDS)
def test_the_whitened_square_is_twice_the_cost(
    shape: tuple[int, int], sides: str, seed: int
) -> None:
    metric, matrix = metric_of(shape, sides, seed), randn(*shape, seed=seed)
    square = float(metric.whiten(matrix).square().sum())
    assert square == pytest.approx(2 * metric.cost(matrix), rel=1e-9)


@given(SHAPES, SIDES, SEEDS, st.integers(0, 7))
def test_truncate_leaves_what_the_weighted_svd_leaves(
    shape: tuple[int, int], sides: str, seed: int, rank: int
) -> None:
    rank = min(rank, *shape)
    metric, matrix = metric_of(shape, sides, seed), randn(*shape, seed=seed)
    b, a = metric.truncate(matrix, rank)
    assert b.shape == (shape[0], rank)
    assert a.shape == (rank, shape[1])
    # The oracle takes symmetric roots, where the code takes Cholesky's.
    roots = []
    for side in whole(metric, shape):
        values, vectors = torch.linalg.eigh(side)
        roots.append((vectors * values.sqrt()) @ vectors.t())
    left = torch.linalg.svdvals(roots[0] @ matrix @ roots[1])[rank:]
    expected = 0.5 * float(left.square().sum())
    assert metric.cost(matrix - b @ a) == pytest.approx(
        expected, rel=1e-6, abs=1e-9 * metric.cost(matrix)
    )


@settings(max_examples=30)
@given(SHAPES, SEEDS, st.integers(1, 6), st.floats(-4, 0))
def test_no_nearby_matrix_of_the_rank_costs_less(
    shape: tuple[int, int], seed: int, rank: int, size: float
) -> None:
    rank = min(rank, *shape)
    metric, matrix = metric_of(shape, "both", seed), randn(*shape, seed=seed)
    b, a = metric.truncate(matrix, rank)
    least = metric.cost(matrix - b @ a)
    for trial in range(5):
        moved_b = b + 10.0**size * b.norm() * randn(*b.shape, seed=trial + 30)
        moved_a = a + 10.0**size * a.norm() * randn(*a.shape, seed=trial + 60)
        assert metric.cost(matrix - moved_b @ moved_a) >= least - 1e-9 * metric.cost(matrix)


@given(SHAPES, SEEDS, st.integers(1, 7))
def test_without_moments_it_is_the_plain_truncated_svd(
    shape: tuple[int, int], seed: int, rank: int
) -> None:
    rank = min(rank, *shape)
    matrix = randn(*shape, seed=seed)
    (b, a), (plain_b, plain_a) = IDENTITY.truncate(matrix, rank), truncate(matrix, rank)
    assert torch.allclose(b @ a, plain_b @ plain_a, atol=1e-9)
    eyes = KfacMetric(torch.eye(shape[0]).double(), torch.eye(shape[1]).double())
    b, a = eyes.truncate(matrix, rank)
    assert torch.allclose(b @ a, plain_b @ plain_a, atol=1e-9)


def test_both_factors_carry_the_same_weight() -> None:
    b, a = metric_of((6, 5)).truncate(randn(6, 5), 3)
    assert torch.allclose(b.norm(dim=0), a.norm(dim=1))


def test_a_zero_matrix_gives_zero_and_finite_factors() -> None:
    b, a = metric_of((6, 5)).truncate(torch.zeros(6, 5).double(), 3)
    assert torch.equal(b @ a, torch.zeros(6, 5).double())
    assert torch.isfinite(b).all()
    assert torch.isfinite(a).all()
    assert float(a.abs().sum() + b.abs().sum()) > 0


def test_a_float32_metric_keeps_the_precision_of_what_it_measures() -> None:
    metric = KfacMetric(moment(6).float(), moment(5).float())
    for dtype in (torch.float32, torch.float64):
        assert metric.apply(randn(6, 5, dtype=dtype)).dtype == dtype
        assert metric.truncate(randn(6, 5, dtype=dtype), 2)[0].dtype == dtype


@pytest.fixture
def factorisations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all matrices that were factorised by Cholesky during the test."""
    shapes: list[tuple[int, ...]] = []
    cholesky = kfac_metric.cholesky

    def counted(matrix: Tensor) -> Tensor:
        shapes.append(tuple(matrix.shape))
        result: Tensor = cholesky(matrix)
        return result

    monkeypatch.setattr(kfac_metric, "cholesky", counted)
    return shapes


def test_each_side_is_factorised_once(factorisations: list[tuple[int, ...]]) -> None:
    metric, matrix = metric_of((6, 5)), randn(6, 5)
    for rank in (1, 2, 3):
        metric.truncate(matrix, rank)
        metric.flipped().truncate(matrix.t(), rank)
        metric.part(0, 6).whiten(matrix)
    assert factorisations == [(5, 5), (6, 6)]
    for _ in range(2):  # some rows have a G of their own, and the C of all
        metric.part(0, 4).truncate(matrix[:4], 2)
        metric.part(0, 4).flipped().truncate(matrix[:4].t(), 2)
    assert factorisations == [(5, 5), (6, 6), (4, 4)]


def test_a_side_that_is_not_used_is_not_factorised(factorisations: list[tuple[int, ...]]) -> None:
    metric = metric_of((6, 5))
    metric.cost(randn(6, 5))
    metric.part(0, 3).flipped().apply(randn(5, 3))
    assert factorisations == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_roots_give_the_same_bits(dtype: torch.dtype) -> None:
    metric, matrix = metric_of((6, 5)), randn(6, 5, dtype=dtype)
    metric.truncate(randn(6, 5), 3)
    metric.truncate(matrix, 3)
    again = metric.truncate(matrix, 3)
    fresh = metric_of((6, 5)).truncate(matrix, 3)
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


def test_kept_roots_are_bounded_and_go_with_their_metric(
    factorisations: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 8 * 6 * 6  # bytes of one root
    monkeypatch.setattr(kfac_metric, "MAX_ROOT_BYTES", 2 * size)
    monkeypatch.setattr(kfac_metric, "_recent", weakref.WeakKeyDictionary())
    metrics, matrix = [metric_of((6, 1), "left", seed) for seed in range(3)], randn(6, 1)
    for metric in metrics:
        metric.whiten(matrix)
    assert sum(kfac_metric._recent.values()) == 2 * size
    metrics[2].whiten(matrix)
    metrics[1].whiten(matrix)
    assert len(factorisations) == 3
    metrics[0].whiten(matrix)  # the least recently used one was dropped
    assert len(factorisations) == 4
    metrics.clear()
    del metric
    gc.collect()
    assert len(kfac_metric._recent) == 0


def random_cost(metric: KfacMetric, shape: tuple[int, int]) -> float:
    """The mean cost of an error whose entries are independent, of variance one."""
    g, c = whole(metric, shape)
    return 0.5 * float(torch.trace(g) * torch.trace(c))


@given(SHAPES, st.sampled_from(["both", "left", "right"]), st.integers(1, 4), SEEDS)
def test_one_metric_for_several_keeps_the_cost_of_a_random_error(
    shape: tuple[int, int], sides: str, count: int, seed: int
) -> None:
    metrics = [metric_of(shape, sides, seed + 7 * j) for j in range(count)]
    total = sum(random_cost(m, shape) for m in metrics)
    assert random_cost(mean_metric(metrics), shape) == pytest.approx(total, rel=1e-9)


def test_of_one_metric_alone_the_mean_is_itself_and_the_scale_of_a_side_is_free() -> None:
    metric, error = metric_of((6, 5)), randn(6, 5)
    assert mean_metric([metric]).cost(error) == pytest.approx(metric.cost(error))
    assert metric.left is not None
    assert metric.right is not None
    other = metric_of((6, 5), seed=9)
    scaled = KfacMetric(metric.left * 1e3, metric.right / 1e3)
    mean, same = mean_metric([metric, other]), mean_metric([scaled, other])
    assert mean.cost(error) == pytest.approx(same.cost(error))


def test_sides_of_unlike_sizes_have_no_mean() -> None:
    mean = mean_metric([metric_of((6, 5)), metric_of((6, 4))])
    assert mean.right is None
    assert mean.left is not None
    assert mean.left.shape == (6, 6)
    assert mean_metric([IDENTITY, metric_of((6, 5))]) == IDENTITY


@given(SHAPES, SEEDS)
def test_the_left_side_can_take_the_scale_of_the_right(shape: tuple[int, int], seed: int) -> None:
    metric = metric_of(shape, seed=seed)
    assert metric.right is not None
    unit = KfacMetric(metric.scaled_left(), metric.right / metric.right.diagonal().mean())
    error = randn(*shape, seed=seed)
    assert unit.cost(error) == pytest.approx(metric.cost(error), rel=1e-9)


def halves(count: int, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Second moments of two halves of `count` samples of one distribution."""
    rows = randn(count, 12, seed=seed) @ moment(12, 3, spread)
    first, second = rows[0::2], rows[1::2]
    return first.t() @ first / len(first), second.t() @ second / len(second)


@given(st.integers(2, 60), SEEDS)
def test_a_shrunk_moment_is_positive_definite_whatever_the_rank(count: int, seed: int) -> None:
    first, second = halves(count, seed)
    found, ridge = shrinkage_estimate(first, second)
    assert 1e-4 <= ridge <= 1
    assert found.dtype == torch.float32
    assert float(torch.linalg.eigvalsh(found.double())[0]) > 0
    # The mean eigenvalue, and with it the scale of all costs, stays.
    mean = float(((first + second) / 2).diagonal().mean())
    assert float(found.diagonal().mean()) == pytest.approx(mean, rel=1e-5)


@settings(max_examples=20)
@given(st.integers(4, 60), SEEDS)
def test_the_ridge_is_half_the_one_that_predicts_the_other_half_best(count: int, seed: int) -> None:
    first, second = halves(count, seed)

    def error(rho: float, mine: Tensor, other: Tensor) -> float:
        eye = torch.eye(len(mine)).double()
        predicted = (1 - rho) * mine + rho * mine.diagonal().mean() * eye
        return float((predicted - other).square().sum())

    # Beyond [0, 1] too: the two are averaged before they are bounded.
    grid = torch.linspace(-1, 2, 301).double().tolist()
    best = [
        min(grid, key=lambda rho, a=a, b=b: error(rho, a, b))
        for a, b in ((first, second), (second, first))
    ]
    expected = min(1.0, max(1e-4, sum(best) / 2 / 2))
    assert shrinkage_estimate(first, second)[1] == pytest.approx(expected, abs=1e-2 / 2)


def test_more_images_need_a_smaller_ridge() -> None:
    def ridge(count: int) -> float:
        return sum(shrinkage_estimate(*halves(count, seed))[1] for seed in range(8)) / 8

    ridges = [ridge(count) for count in (8, 32, 128, 512, 2048)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[0] > 20 * ridges[-1]


def test_halves_that_agree_need_the_least_ridge() -> None:
    first, _ = halves(40)
    found, ridge = shrinkage_estimate(first, first)
    assert ridge == 1e-4
    assert torch.allclose(found.double(), first, rtol=1e-3, atol=1e-3 * float(first.max()))


def test_of_nothing_the_moment_is_the_identity() -> None:
    found, _ = shrinkage_estimate(torch.zeros(3, 3).double(), torch.zeros(3, 3).double())
    assert torch.equal(found, torch.eye(3))
    # A width of one has one eigenvalue, which is its own mean.
    found, ridge = shrinkage_estimate(
        torch.full((1, 1), 4.0).double(), torch.full((1, 1), 2.0).double()
    )
    assert float(found) == pytest.approx(3.0)
    assert ridge == 1e-4


def test_a_ridge_comes_nearer_to_the_truth_than_none() -> None:
    truth = moment(12, 3, spread=0.5) @ moment(12, 3, spread=0.5)
    plain, ridged = 0.0, 0.0
    for seed in range(10):
        first, second = halves(16, seed, spread=0.5)
        plain += float(((first + second) / 2 - truth).square().sum())
        ridged += float((shrinkage_estimate(first, second)[0].double() - truth).square().sum())
    assert ridged < 0.8 * plain
