"""What fits are made of, against torch.linalg and against matrices made on purpose."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiedconv.numerics import linalg

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b).clamp(min=1e-30))


@given(SHAPES, st.integers(0, 9))
def test_spectrum_is_that_of_the_svd(shape: tuple[int, int], seed: int) -> None:
    m = randn(*shape, seed=seed)
    expected = torch.linalg.svdvals(m)
    assert torch.allclose(linalg.spectrum(m), expected, atol=1e-6 * float(expected[0]))


@given(SHAPES, st.integers(0, 12), st.integers(0, 9))
def test_truncate_is_the_best_approximation_of_its_rank(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    m = randn(*shape, seed=seed)
    rank = min(rank, *shape)
    b, a = linalg.truncate(m, rank)
    assert b.shape == (shape[0], rank)
    assert a.shape == (rank, shape[1])
    left = torch.linalg.vector_norm(m - b @ a)
    best = torch.linalg.vector_norm(torch.linalg.svdvals(m)[rank:])
    assert abs(float(left - best)) <= 1e-7 * float(torch.linalg.vector_norm(m))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (20, 20), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_is_exact(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m = randn(*shape, dtype=dtype)
    b, a = linalg.truncate(m, min(shape))
    assert b.dtype == a.dtype == dtype
    assert distance(b @ a, m) < (1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_the_iteration_for_large_matrices_comes_close_to_the_best(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = randn(*shape)
    best = torch.linalg.vector_norm(torch.linalg.svdvals(m)[10:])
    monkeypatch.setattr(linalg, "EXACT_UP_TO", 8)
    b, a = linalg.truncate(m, 10)
    assert float(torch.linalg.vector_norm(m - b @ a)) <= 1.02 * float(best)


def test_a_zero_matrix_gives_zero_and_factors_that_can_learn() -> None:
    b, a = linalg.truncate(torch.zeros(6, 4), 3)
    assert torch.equal(b @ a, torch.zeros(6, 4))
    assert torch.isfinite(b).all()
    assert torch.isfinite(a).all()
    # With both factors zero no gradient would ever reach either.
    assert float(a.abs().sum() + b.abs().sum()) > 0
    assert torch.equal(linalg.spectrum(torch.zeros(6, 4)), torch.zeros(4, dtype=torch.float64))


def test_every_direction_of_a_rank_deficient_matrix_can_learn() -> None:
    m = randn(6, 1) @ randn(1, 5)
    b, a = linalg.truncate(m, 3)
    assert distance(b @ a, m) < 1e-7
    assert (torch.linalg.vector_norm(b, dim=0) + torch.linalg.vector_norm(a, dim=1) > 0).all()


def lors_error(matrices: list[Tensor], rank: int, steps: int) -> float:
    base, pairs = linalg.base_and_residuals(matrices, [rank] * len(matrices), steps=steps)
    return sum(
        float((w - base - b @ a).square().sum()) for w, (b, a) in zip(matrices, pairs, strict=True)
    )


@settings(max_examples=25)
@given(SHAPES, st.integers(2, 4), st.integers(0, 9))
def test_lors_error_never_grows_with_rank(shape: tuple[int, int], count: int, seed: int) -> None:
    matrices = [randn(*shape, seed=seed + j) for j in range(count)]
    total = sum(float(m.square().sum()) for m in matrices)
    errors = [lors_error(matrices, rank, 8) for rank in range(min(shape) + 1)]
    for low, high in itertools.pairwise(errors):
        # Two runs of an alternation may stop in different places: a thousandth is allowed.
        assert high <= low + 1e-3 * total
    assert errors[-1] <= 1e-12 * total


@settings(max_examples=25)
@given(SHAPES, st.integers(2, 4), st.integers(0, 5), st.integers(0, 9))
def test_lors_error_never_grows_with_steps(
    shape: tuple[int, int], count: int, rank: int, seed: int
) -> None:
    matrices = [randn(*shape, seed=seed + j) for j in range(count)]
    total = sum(float(m.square().sum()) for m in matrices)
    errors = [lors_error(matrices, min(rank, *shape), steps) for steps in range(6)]
    for before, after in itertools.pairwise(errors):
        assert after <= before + 1e-10 * total


def test_lors_finds_a_base_with_low_rank_residuals_better_than_the_mean_alone() -> None:
    base = randn(20, 16)
    matrices = [base + randn(20, 2, seed=j) @ randn(2, 16, seed=9 + j) for j in range(1, 5)]
    assert lors_error(matrices, 2, 200) < 0.7 * lors_error(matrices, 2, 0)


def test_rank_zero_is_the_mean() -> None:
    matrices = [randn(5, 4, seed=j) for j in range(3)]
    base, pairs = linalg.base_and_residuals(matrices, [0, 0, 0])
    assert torch.equal(base, torch.stack(matrices).mean(0))
    assert all(b.shape == (5, 0) and a.shape == (0, 4) for b, a in pairs)


@settings(max_examples=40)
@given(SHAPES, st.integers(2, 4), st.integers(0, 30))
def test_shared_with_scales_recovers_what_was_made_with_scales_and_signs(
    shape: tuple[int, int], count: int, seed: int
) -> None:
    w = randn(*shape, seed=seed)
    matrices = [w]
    for j in range(1, count):
        s, t = randn(shape[0], 1, seed=seed + 50 + j), randn(1, shape[1], seed=seed + 90 + j)
        s, t = s.sign() * (s.abs() + 0.5), t.sign() * (t.abs() + 0.5)
        matrices.append(s * w * t)
    found, scales = linalg.shared_with_scales(matrices)
    for m, (s, t) in zip(matrices, scales, strict=True):
        assert torch.equal((s * found * t).sign(), m.sign())
        assert distance(s * found * t, m) < 2e-2
    assert torch.equal(scales[0][0], torch.ones(shape[0], 1, dtype=w.dtype))
    assert torch.equal(scales[0][1], torch.ones(1, shape[1], dtype=w.dtype))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_row_and_column_signs_alone_are_recovered(
    sign: float,
) -> None:
    w = randn(16, 12)
    s = sign * torch.where(torch.arange(16) % 3 == 0, -1.0, 1.0).unsqueeze(1)
    found, scales = linalg.shared_with_scales([w, s * w * 3.0])
    assert distance(scales[1][0] * found * scales[1][1], s * w * 3.0) < 1e-6


def test_scales_share_better_than_none() -> None:
    """With the best W for each, scales and signs leave less error than W alone."""
    matrices = [randn(40, 30, seed=j) * (1 + j) for j in range(3)]

    def error(w: torch.Tensor, scales: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return sum(
            float((m - s * w * t).square().sum() / m.square().sum())
            for m, (s, t) in zip(matrices, scales, strict=True)
        )

    w, scales = linalg.shared_with_scales(matrices)
    ones = [(m.new_ones(40, 1), m.new_ones(1, 30)) for m in matrices]
    plain = linalg.weighted_base(matrices, ones, [1 / linalg.energy(m) for m in matrices])
    assert error(w, scales) < 0.95 * error(plain, ones)


def test_a_narrower_matrix_is_compared_with_the_first_columns() -> None:
    w = randn(6, 8)
    found, scales = linalg.shared_with_scales([w, 2.0 * w[:, :5]])
    assert found.shape == (6, 8)
    assert distance(scales[1][0] * found[:, :5] * scales[1][1], 2.0 * w[:, :5]) < 1e-6


def test_zero_matrices_share_without_nan() -> None:
    w, scales = linalg.shared_with_scales([torch.zeros(4, 3), torch.zeros(4, 3)])
    assert torch.equal(w, torch.zeros(4, 3))
    assert all(torch.isfinite(x).all() for pair in scales for x in pair)
    base, pairs = linalg.base_and_residuals([torch.zeros(4, 3)] * 2, [2, 2])
    assert all(torch.equal(base + b @ a, torch.zeros(4, 3)) for b, a in pairs)


def test_weighted_base_is_the_least_squares_solution() -> None:
    matrices = [randn(3, 2, seed=j) for j in range(2)]
    scales = [(randn(3, 1, seed=5 + j), randn(1, 2, seed=8 + j)) for j in range(2)]
    w = linalg.weighted_base(matrices, scales, [1.0, 0.3]).requires_grad_()
    loss = sum(
        (m - s * w * t).square().sum() * weight
        for m, (s, t), weight in zip(matrices, scales, [1.0, 0.3], strict=True)
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    assert w.grad is not None
    assert float(w.grad.abs().max()) < 1e-12


@given(st.integers(1, 6), st.integers(0, 20))
def test_procrustes_is_orthogonal_and_best(size: int, seed: int) -> None:
    cross = randn(3, size, size, seed=seed)
    g = linalg.procrustes(cross)
    assert torch.allclose(g @ g.mT, torch.eye(size, dtype=g.dtype).expand(3, -1, -1), atol=1e-9)
    score = torch.diagonal(g @ cross, dim1=1, dim2=2).sum(1)
    assert torch.allclose(score, torch.linalg.svdvals(cross).sum(1), atol=1e-9)


def test_procrustes_finds_the_rotation_that_was_applied() -> None:
    rotation = torch.linalg.qr(randn(5, 5))[0]
    x = randn(5, 40, seed=1)
    assert torch.allclose(linalg.procrustes(x @ (rotation @ x).t()), rotation, atol=1e-9)


@given(st.integers(1, 6), st.integers(0, 20))
def test_linear_assignment_is_the_best_of_all_assignments(size: int, seed: int) -> None:
    similarity = randn(size, size, seed=seed)
    order = linalg.linear_assignment(similarity)
    assert sorted(order.tolist()) == list(range(size))
    rows = torch.arange(size)
    best = max(
        float(similarity[rows, torch.tensor(p)].sum()) for p in itertools.permutations(range(size))
    )
    assert float(similarity[rows, order].sum()) == pytest.approx(best)


def test_match_undoes_a_permutation() -> None:
    x = torch.nn.functional.normalize(randn(12, 5))
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x[shuffled][linalg.linear_assignment(x @ x[shuffled].t())], x)


def test_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = [randn(40, 30, seed=j, dtype=torch.float32) for j in range(3)]

    def everything() -> list[Tensor]:
        base, pairs = linalg.base_and_residuals(matrices, [4, 4, 4])
        w, scales = linalg.shared_with_scales(matrices)
        found = [base, w, *linalg.truncate(matrices[0], 5), linalg.spectrum(matrices[1])]
        return found + [x for pair in [*pairs, *scales] for x in pair]

    for limit in (linalg.EXACT_UP_TO, 8):
        monkeypatch.setattr(linalg, "EXACT_UP_TO", limit)
        first = everything()
        torch.manual_seed(99)  # nothing may depend on the global generator
        assert all(torch.equal(a, b) for a, b in zip(first, everything(), strict=True))
