"""Factors that are improved in a metric: never worse, and the optimum where one is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from covering import slow_unless
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiedconv.core.expr import Expr, MatMul, Permute, Ref
from tiedconv.numerics import least_squares as leastsquares
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.least_squares import Factors, conjugate_gradients, improve, total_cost
from tiedconv.numerics.linalg import base_and_residuals
from tiedconv.schemes import Layout, all_schemes, make_scheme

Shapes = list[tuple[int, int]]

# Every form that a scheme stores: its options, and shapes that it takes.
FORMS: dict[str, tuple[str, dict[str, Any], Shapes]] = {
    "lowrank": ("lowrank", {"rank": 3}, [(8, 6)]),
    "shared": ("shared", {}, [(8, 6)] * 3),
    "tied": ("tied", {}, [(8, 6)] * 2),
    "tied, no scales": ("tied", {"scale": False}, [(8, 6)] * 3),
    "tied, a slice": ("tied", {"scale": False}, [(8, 6), (8, 4)]),
    "tied, rank": ("tied", {"rank": 2}, [(8, 6)] * 2),
    "tied, core": ("tied", {"base_rank": 3}, [(8, 6)] * 2),
    "tied, core and rank": ("tied", {"base_rank": 3, "rank": 2}, [(8, 6)] * 3),
    "tied, a slice of a core": ("tied", {"base_rank": 3, "scale": False}, [(8, 6), (8, 4)]),
    "lors": ("lors", {"rank": 2}, [(8, 6)] * 3),
    "lors, a base alone": ("lors", {"rank": 0}, [(8, 6)] * 3),
    "lors, core": ("lors", {"rank": 2, "base_rank": 3}, [(8, 6)] * 3),
    "lors, bases": ("lors", {"rank": 1, "bases": 2}, [(8, 6)] * 3),
    "basis": ("basis", {"base_rank": 3}, [(8, 6), (5, 6), (9, 6)]),
    "lors-adaptive": ("lors-adaptive", {"shape": [4, 3], "rank": 2}, [(24, 5)] * 3),
    "lors-adaptive, terms": (
        "lors-adaptive",
        {"shape": [4, 3], "rank": 1, "k": [0, 1, 3]},
        [(12, 6)] * 3,
    ),
    "narrow": ("narrow", {"width": 3, "step": 1}, [(8, 6), (5, 8)]),
    "narrow, kernels": ("narrow", {"width": 2, "step": 1}, [(4, 5), (3, 8), (6, 3)]),
    "basis, tied": ("basis", {"base_rank": 3, "owners": [0, 0, 2]}, [(8, 6), (8, 6), (9, 6)]),
}

each_form = pytest.mark.parametrize("form", FORMS)
# Forms that need thousands of sweeps until nothing is left to gain.
LONG = ("tied, rank", "tied, core and rank", "lors, bases", "lors-adaptive")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moment(size: int, seed: int = 0, spread: float = 3.0) -> Tensor:
    """A positive definite matrix whose eigenvalues span `10^spread`."""
    q = torch.linalg.qr(randn(size, size, seed=seed))[0]
    return (q * 10.0 ** (-spread * torch.linspace(0, 1, size, dtype=q.dtype))) @ q.t()


def metric_of(shape: tuple[int, int], seed: int = 0, spread: float = 3.0) -> KfacMetric:
    return KfacMetric(moment(shape[0], seed + 100, spread), moment(shape[1], seed + 200, spread))


def problem(
    form: str, seed: int, spread: float = 3.0, dtype: torch.dtype = torch.float64
) -> tuple[Layout, list[Tensor], list[KfacMetric], Factors]:
    """A form's layout, matrices for it, what their errors cost, and the form's own fit."""
    name, options, shapes = FORMS[form]
    scheme = make_scheme(name, options)
    matrices = [randn(*shape, seed=seed + j, dtype=dtype) for j, shape in enumerate(shapes)]
    metrics = [metric_of(shape, seed + 7 * j, spread) for j, shape in enumerate(shapes)]
    return scheme.layout(shapes), matrices, metrics, scheme.fit(matrices)


def long(metric: KfacMetric) -> Tensor:
    """The metric as one matrix on rows put one behind the other."""
    assert metric.left is not None
    assert metric.right is not None
    return torch.kron(metric.left, metric.right)


def test_every_scheme_with_a_form_of_its_own_is_tried() -> None:
    assert {name for name, _, _ in FORMS.values()} == all_schemes().keys() - {"auto"}


@each_form
def test_total_cost_is_the_sum_over_the_matrices(form: str) -> None:
    layout, matrices, metrics, start = problem(form, 0)
    expected = 0.0
    for expr, matrix, metric in zip(layout.weights, matrices, metrics, strict=True):
        error = (matrix - expr.evaluate(start.__getitem__)).flatten()
        expected += 0.5 * float(error @ long(metric) @ error)
    assert total_cost(layout.weights, start, matrices, metrics) == pytest.approx(expected)


@pytest.mark.parametrize("form", slow_unless(FORMS, FORMS.keys() - {"lors-adaptive"}))
@settings(max_examples=7)
@given(
    seed=st.integers(0, 30),
    spread=st.floats(0, 8),
    double=st.booleans(),
    fitted=st.booleans(),
    steps=st.integers(1, 8),
)
def test_improving_never_raises_the_cost(
    form: str, seed: int, spread: float, double: bool, fitted: bool, steps: int
) -> None:
    dtype = torch.float64 if double else torch.float32
    layout, matrices, metrics, start = problem(form, seed, spread, dtype)
    if not fitted:
        start = {n: randn(*s, seed=seed, dtype=dtype) for n, s in layout.factors.items()}
    kept = {n: t.clone() for n, t in start.items()}
    made = improve(layout.weights, start, matrices, metrics, steps=steps)
    before = total_cost(layout.weights, start, matrices, metrics)
    after = total_cost(layout.weights, made, matrices, metrics)
    assert after <= before
    assert {n: (tuple(t.shape), t.dtype) for n, t in made.items()} == {
        n: (s, dtype) for n, s in layout.factors.items()
    }
    assert all(torch.equal(start[n], t) for n, t in kept.items())  # the start itself stays


@each_form
def test_improving_gains_where_the_metric_is_not_plain(form: str) -> None:
    layout, matrices, metrics, start = problem(form, 1)
    made = improve(layout.weights, start, matrices, metrics)
    cost = total_cost(layout.weights, start, matrices, metrics)
    assert total_cost(layout.weights, made, matrices, metrics) < 0.7 * cost


@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.slow) if form in LONG else form for form in FORMS],
)
def test_at_the_end_no_factor_alone_can_gain_more(form: str) -> None:
    """Each factor of a settled fit is the least-squares solution, the others held fixed."""
    layout, matrices, metrics, start = problem(form, 2, spread=1.0)
    made, cost = start, total_cost(layout.weights, start, matrices, metrics)
    for _ in range(100):  # one round stops when a sweep gains little
        made = improve(layout.weights, made, matrices, metrics, sweeps=5, steps=30)
        before, cost = cost, total_cost(layout.weights, made, matrices, metrics)
        if before - cost <= 1e-3 * before:
            break
    for name, factor in made.items():
        best = least_squares(layout.weights, made, name, matrices, metrics)
        assert best.shape == factor.shape
        least = total_cost(layout.weights, {**made, name: best}, matrices, metrics)
        assert least <= cost * (1 + 1e-9)
        assert cost == pytest.approx(least, rel=1e-2), name


def least_squares(
    weights: tuple[Expr, ...], factors: Factors, name: str, matrices: list[Tensor],
    metrics: list[KfacMetric],
) -> Tensor:  # fmt: skip
    """The best value of one factor, from the normal equations written out in full."""
    shape, size = factors[name].shape, factors[name].numel()

    def made(value: Tensor) -> list[Tensor]:
        found = {**factors, name: value.reshape(shape)}
        return [e.evaluate(found.__getitem__).flatten() for e in weights]

    zero = made(torch.zeros(size).double())
    columns = [made(row) for row in torch.eye(size).double()]
    normal, wanted = torch.zeros(size, size).double(), torch.zeros(size).double()
    for j, metric in enumerate(metrics):
        jacobian = torch.stack([column[j] - zero[j] for column in columns], 1)
        pull = jacobian.t() @ long(metric)
        normal += pull @ jacobian
        wanted += pull @ (matrices[j].flatten() - zero[j])
    return torch.linalg.lstsq(normal, wanted, driver="gelsd").solution.reshape(shape)


@settings(max_examples=25)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7), st.integers(0, 20))
def test_low_rank_alone_is_the_svd_in_the_metric(
    out: int, inputs: int, rank: int, seed: int
) -> None:
    rank = min(rank, out, inputs)
    metric, matrix = metric_of((out, inputs), seed), randn(out, inputs, seed=seed)
    layout = make_scheme("lowrank", {"rank": rank}).layout([(out, inputs)])
    start = {n: randn(*s, seed=seed + 5) for n, s in layout.factors.items()}
    made = improve(layout.weights, start, [matrix], [metric])
    b, a = metric.truncate(matrix, rank)
    assert total_cost(layout.weights, made, [matrix], [metric]) <= metric.cost(
        matrix - b @ a
    ) + 1e-12 * metric.cost(matrix)


def test_one_base_in_a_common_metric_is_the_mean() -> None:
    metric = metric_of((8, 6), spread=4.0)
    layout, matrices, _, start = problem("shared", 0)
    start = {n: randn(*t.shape, seed=9) for n, t in start.items()}
    made = improve(layout.weights, start, matrices, [metric] * 3)
    assert torch.allclose(made["base"], sum(matrices) / 3, atol=1e-6)  # type: ignore[arg-type]


def test_one_base_in_unlike_metrics_solves_the_normal_equations() -> None:
    layout, matrices, metrics, start = problem("shared", 0)
    made = improve(layout.weights, start, matrices, metrics, sweeps=20, steps=100)
    normal = sum(map(long, metrics))
    wanted = sum(long(g) @ m.flatten() for g, m in zip(metrics, matrices, strict=True))
    assert isinstance(normal, Tensor)
    assert isinstance(wanted, Tensor)
    best = {"base": torch.linalg.solve(normal, wanted).reshape(8, 6)}
    least = total_cost(layout.weights, best, matrices, metrics)
    assert least < 0.9 * total_cost(layout.weights, start, matrices, metrics)
    assert total_cost(layout.weights, made, matrices, metrics) == pytest.approx(least, rel=1e-4)


def test_without_a_metric_a_base_and_residuals_end_where_the_plain_fit_does() -> None:
    layout, matrices, _, start = problem("lors", 0)
    metrics = [IDENTITY] * 3
    made = improve(layout.weights, start, matrices, metrics, sweeps=100)
    base, pairs = base_and_residuals(matrices, [2, 2, 2], steps=500)
    left = [m - base - b @ a for m, (b, a) in zip(matrices, pairs, strict=True)]
    plain = sum(0.5 * float(e.square().sum()) for e in left)
    assert total_cost(layout.weights, made, matrices, metrics) == pytest.approx(plain, rel=0.02)


@each_form
def test_the_scale_of_the_costs_is_without_effect(form: str) -> None:
    layout, matrices, metrics, start = problem(form, 3, spread=2.0)
    made = improve(layout.weights, start, matrices, metrics)
    scaled = [KfacMetric(m.left * 1e-9, m.right) for m in metrics if m.left is not None]
    again = improve(layout.weights, start, matrices, scaled)
    for expr in layout.weights:
        assert torch.allclose(
            expr.evaluate(made.__getitem__), expr.evaluate(again.__getitem__), atol=1e-3
        )


@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(0, 20))
def test_conjugate_gradients_solve_a_system(size: int, seed: int) -> None:
    hessian, wanted = moment(size, seed, spread=1.5), randn(size, seed=seed)
    # The search stops at a millionth of the squared residual it began with.
    found = conjugate_gradients(
        lambda x: hessian @ x - wanted, randn(size, seed=seed + 1), lambda r: r, 3 * size
    )
    start = float((hessian @ randn(size, seed=seed + 1) - wanted).norm())
    assert float((hessian @ found - wanted).norm()) <= 1.1e-3 * start
    exact = conjugate_gradients(
        lambda x: hessian @ x - wanted, found, lambda r: torch.linalg.solve(hessian, r), 1
    )
    assert torch.allclose(exact, torch.linalg.solve(hessian, wanted), atol=1e-8)


def test_conjugate_gradients_stay_where_there_is_nothing_to_gain() -> None:
    x = randn(5)
    assert torch.equal(conjugate_gradients(torch.zeros_like, x, lambda r: r, 8), x)
    calls: list[int] = []

    def gradient(at: Tensor) -> Tensor:
        calls.append(1)
        return at - x

    found = conjugate_gradients(gradient, torch.zeros(5).double(), lambda r: r, 50)
    assert torch.allclose(found, x)
    assert len(calls) <= 3  # the identity is solved in one step


def steps_needed(form: str, share: float, *, plain: bool, monkeypatch: Any) -> int:
    """Steps of one turn over the factors until the cost is that share of the start's."""

    def none(*_: Any) -> Callable[[Tensor], Tensor]:
        return lambda r: r

    layout, matrices, metrics, start = problem(form, 0, spread=4.0)
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(leastsquares, "_preconditioner", none)
        for steps in (*range(1, 20), *range(20, 400, 20)):
            made = improve(layout.weights, start, matrices, metrics, sweeps=1, steps=steps)
            cost = total_cost(layout.weights, made, matrices, metrics)
            if cost <= share * total_cost(layout.weights, start, matrices, metrics):
                return steps
    return 400


@pytest.mark.parametrize("form", ["shared", "basis", "lors, a base alone"])
def test_moments_beside_a_factor_save_steps(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, matrices, metrics, start = problem(form, 0, spread=4.0)
    settled = improve(layout.weights, start, matrices, metrics, sweeps=1, steps=500)
    share = 1.1 * total_cost(layout.weights, settled, matrices, metrics) / total_cost(
        layout.weights, start, matrices, metrics
    )  # fmt: skip
    with_it = steps_needed(form, share, plain=False, monkeypatch=monkeypatch)
    without = steps_needed(form, share, plain=True, monkeypatch=monkeypatch)
    assert with_it < 0.5 * without


def test_a_factor_read_transposed_is_solved_in_one_step() -> None:
    """Both uses of W ask for the same moments, one of them on the other side."""
    metric, w = metric_of((8, 6), spread=4.0), Ref("W", (8, 6))
    weights: list[Expr] = [w, Permute(w, (1, 0))]
    matrices = [randn(8, 6, seed=1), randn(6, 8, seed=2)]
    made = improve(
        weights, {"W": randn(8, 6, seed=3)}, matrices, [metric, metric.flipped()],
        sweeps=1, steps=1,
    )  # fmt: skip
    assert torch.allclose(made["W"], (matrices[0] + matrices[1].t()) / 2, atol=1e-6)


def test_a_product_used_twice_is_not_taken_for_a_private_one() -> None:
    """Its exact fit to one matrix would be paid by the other."""
    product = MatMul(Ref("B", (8, 2)), Ref("A", (2, 6)))
    matrices = [randn(8, 6, seed=1), randn(8, 6, seed=2)]
    start = {"B": randn(8, 2, seed=3), "A": randn(2, 6, seed=4)}
    metrics = [IDENTITY, IDENTITY]
    made = improve([product, product], start, matrices, metrics, sweeps=50, steps=30)
    b, a = IDENTITY.truncate((matrices[0] + matrices[1]) / 2, 2)
    least = total_cost([product, product], {"B": b, "A": a}, matrices, metrics)
    assert total_cost([product, product], made, matrices, metrics) == pytest.approx(least, rel=1e-2)
