"""Adaptive LORS: generators that are fitted, stored and applied as factors, and never made."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from hypothesis import given, settings
from hypothesis import strategies as st
from micro import all_micros
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiedconv
from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Ref, Reshape, transpose
from tiedconv.core.expr_json import from_json
from tiedconv.errors import NothingToConvert, PlanError, SchemeError, TiedconvError
from tiedconv.io.validation import check_plan
from tiedconv.numerics.linalg import energy
from tiedconv.runtime.factored import apply
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.factored_torch import Features, linear
from tiedconv.runtime.flops import apply_flops, never_materialized
from tiedconv.runtime.generator import generate, parts_of
from tiedconv.runtime.tie import (
    clear_offsets,
    dense_state_dict,
    scale_offsets,
    set_offsets,
    state_of,
    tied_weights,
)
from tiedconv.runtime.tied_module import is_factored
from tiedconv.schemes import make_scheme
from tiedconv.schemes._tucker import Term, block_energies, fit_stack, start, sweep

CHANNEL: dict[str, Any] = {"shape": [8, 8], "include": ["*channel*"]}
SPATIAL: dict[str, Any] = {"shape": [6, 4], "include": ["*spatial*"], "rank": 2, "k": [1, 1, 2]}
MICRO = all_micros()["generators"]

few = st.integers(1, 3)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tied(**options: Any) -> nn.Module:
    return tiedconv.convert(MICRO.model(), "lors-adaptive", **options)


# The algebra


@st.composite
def generators(draw: st.DrawFn, rows: int | None = None) -> tuple[Expr, dict[str, Tensor]]:
    """A generated weight, and the stored tensors."""
    groups, out, inputs, width, terms, r, s = (draw(few) for _ in range(7))
    shapes = {
        "e": (terms * r * s, width),
        "b": (groups * out, terms * r),
        "a": (groups * terms * s, inputs),
    }
    tensors = {n: randn(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    e, b, a = (Ref(n, shape) for n, shape in shapes.items())
    return generate(e, b, a, groups, terms), tensors


@given(generators())
def test_a_generated_weight_is_what_the_paper_says(
    made: tuple[Expr, dict[str, Tensor]],
) -> None:
    """For each query and group, the sum over terms of B E(q) A."""
    expr, tensors = made
    parts = parts_of(expr)
    assert parts is not None
    groups, _, out, _ = parts.left.shape
    terms, r, s = parts.inner
    inputs = parts.right.shape[-1]
    q = randn(4, expr.shape[1], seed=9)
    b = tensors["b"].reshape(groups, out, terms, r)
    a = tensors["a"].reshape(groups, terms, s, inputs)
    e = (q @ tensors["e"].t()).reshape(-1, terms, r, s)
    expected = torch.stack([
        torch.stack([
            sum((b[g, :, k] @ one[k] @ a[g, k] for k in range(terms)), torch.zeros(out, inputs))
            for g in range(groups)
        ])
        for one in e
    ])  # fmt: skip
    found = linear(expr, q, tensors.__getitem__)
    assert torch.allclose(found, expected.flatten(1))
    assert torch.allclose(q @ expr.evaluate(tensors.__getitem__).t(), found)
    assert from_json(expr.to_json()) == expr
    assert parts_of(expr.rename(lambda n: f"tied/{n}")) is not None


@given(generators(), st.sampled_from(["sum", "rows", "joined", "product"]))
def test_a_generated_weight_is_factored_wherever_it_stands(
    made: tuple[Expr, dict[str, Tensor]], where: str
) -> None:
    expr, tensors = made
    rows, width = expr.shape
    base = Ref("base", expr.shape)
    tensors = {**tensors, "base": randn(rows, width, seed=5), "s": randn(rows, 1, seed=6)}
    tensors["v"] = randn(width, 4, seed=7)
    whole: Expr = {
        "sum": lambda: Add(base, expr),
        "rows": lambda: Mul(Add(expr, base), Ref("s", (rows, 1))),
        "joined": lambda: Cat((expr, base), 0),
        "product": lambda: MatMul(expr, Ref("v", (width, 4))),
    }[where]()
    x = randn(2, 3, whole.shape[1], seed=8)
    found = apply(whole, x, Features(lambda e: e.evaluate(tensors.__getitem__)))
    assert torch.allclose(found, x @ whole.evaluate(tensors.__getitem__).t())
    assert never_materialized(whole)
    assert not never_materialized(transpose(whole))


def test_another_expression_of_the_same_nodes_is_no_generated_weight() -> None:
    with pytest.raises(PlanError) as caught:
        generate(Ref("e", (8, 5)), Ref("b", (6, 2)), Ref("a", (4, 3)), 1, 2)
    assert caught.value.code == "malformed-expression"
    sound = generate(Ref("e", (8, 5)), Ref("b", (6, 4)), Ref("a", (4, 3)), 1, 2)
    assert parts_of(sound) is not None
    assert isinstance(sound, Reshape)
    assert parts_of(Reshape(sound.x, (5, 18))) is None
    assert parts_of(sound.x) is None
    for x, y in (((2, 3, 4), (3, 4, 5)), ((4,), (4, 5))):
        with raises(PlanError, "malformed-expression") as caught:
            MatMul(Ref("x", x), Ref("y", y))
        assert caught.value.code == "malformed-expression"


# The fit


def term(groups: int, out: int, inputs: int, width: int, r: int, seed: int) -> Term:
    return Term(
        randn(groups, out, r, seed=seed, dtype=torch.float32),
        randn(r, r, width, seed=seed + 1, dtype=torch.float32),
        randn(groups, r, inputs, seed=seed + 2, dtype=torch.float32),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_one_term_is_found_exactly(groups: int) -> None:
    whole = term(groups, 12, 10, 20, 3, 0).value
    found = start(whole, 3)
    for _ in range(2):
        found = sweep(whole, found)
    assert float((found.value - whole).norm() / whole.norm()) < 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_a_stack_of_that_form_is_found_exactly(groups: int) -> None:
    base = randn(groups, 12, 10, 20, seed=50, dtype=torch.float32)
    stack = [base + 0.1 * term(groups, 12, 10, 20, 3, 10 * i).value for i in range(6)]
    found, terms, errors = fit_stack(stack, [1] * 6, 3)
    for whole, mine in zip(stack, terms, strict=True):
        made = found + sum((t.value for t in mine), torch.zeros(()))
        assert float((made - whole).norm() / whole.norm()) < 1e-5
    assert errors == sorted(errors, reverse=True)


@pytest.mark.slow
@settings(max_examples=15)
@given(few, st.integers(1, 5), st.integers(1, 5), few, few, st.integers(0, 99))
def test_the_error_never_rises_and_more_terms_fit_no_worse(
    groups: int, out: int, inputs: int, width: int, rank: int, seed: int
) -> None:
    stack = [randn(groups, out, inputs, width, seed=seed + i) for i in range(3)]
    rank = min(rank, max(out, inputs))
    total = sum(map(energy, stack))
    ends = []
    for counts in ([0, 0, 0], [1, 1, 1], [1, 2, 2]):
        _, terms, errors = fit_stack(stack, counts, rank)
        assert [len(mine) for mine in terms] == counts
        assert all(b <= a + 1e-12 * total for a, b in itertools.pairwise(errors))
        ends.append(errors[-1])
    assert ends[1] < ends[0] or ends[0] < 1e-12 * total
    for whole in stack:
        blocks = block_energies(whole, rank)
        assert float(blocks.sum()) == pytest.approx(energy(whole))
        found = start(whole, rank)
        removed = energy(whole) - energy(whole - sweep(whole, found).value)
        assert removed >= float(blocks[0]) - 1e-9 * energy(whole)


def test_full_rank_gives_the_generators_back_and_the_same_fit_each_time() -> None:
    shapes = [(24, 5)] * 3
    matrices = [randn(*shape, seed=j) for j, shape in enumerate(shapes)]
    scheme = make_scheme("lors-adaptive", {"shape": [6, 4], "rank": 10**6})
    factors = scheme.fit(matrices)
    for m, expr in zip(matrices, scheme.layout(shapes).weights, strict=True):
        assert torch.allclose(expr.evaluate(factors.__getitem__), m)
    assert all(torch.equal(t, factors[n]) for n, t in scheme.fit(matrices).items())
    assert {n: tuple(t.shape) for n, t in factors.items()} == dict(scheme.layout(shapes).factors)


def test_a_fit_beats_a_base_alone_and_a_budget_spends_terms_where_they_reduce_the_error() -> None:
    errors = {}
    for k in ([0, 0, 0], [1, 1, 1], [1, 2, 3]):
        plan = state_of(tied(**CHANNEL, k=k)).plan
        errors[sum(k)] = plan.groups[0].error or 0.0
    assert errors[6] < errors[3] < errors[0]
    model = MICRO.model()
    with torch.no_grad():
        for stage in model.stages:
            stage.channel_generator.weight.copy_(model.stages[0].channel_generator.weight)
        model.stages[2].channel_generator.weight.add_(0.1 * randn(128, 32, dtype=torch.float32))
    plan = state_of(tiedconv.convert(model, "lors-adaptive", **CHANNEL, params="84%")).plan
    assert plan.stored <= 0.84 * plan.original
    k = plan.groups[0].options["k"]
    assert k[2] > max(k[:2])


def test_equal_layers_leave_terms_that_training_can_still_move() -> None:
    model = MICRO.model()
    with torch.no_grad():
        for stage in model.stages:
            stage.channel_generator.weight.copy_(model.stages[0].channel_generator.weight)
    compact = tiedconv.convert(model, "lors-adaptive", **CHANNEL)
    assert all(torch.isfinite(p).all() for p in compact.parameters())
    assert torch.allclose(MICRO.logits(compact), MICRO.logits(model), atol=1e-4)


# Sizes


def test_the_papers_sizes() -> None:
    """AdaMixer: 6 stages, 2 groups of 128 x 128 and 128 x 64, rank 16, K = 1, 1, 2, 2, 3, 3."""
    for (out, inputs), bias in (((128, 128), 0), ((128, 64), 1)):
        shapes = [(2 * out * inputs, 256 + bias)] * 6
        options = {"shape": [out, inputs], "rank": 16, "k": [1, 1, 2, 2, 3, 3]}
        layout = make_scheme("lors-adaptive", options).layout(shapes)
        a_term = (256 + bias) * 16 * 16 + 2 * (out * 16 + 16 * inputs)
        stored = sum(map(math.prod, layout.factors.values()))
        assert stored == math.prod(shapes[0]) + 12 * a_term
        taken = [apply_flops(expr) or 0 for expr in layout.weights]
        for count, k in zip(taken, options["k"], strict=True):
            core, groups = 256 * (256 + bias), 2 * 16 * out * (16 + inputs)
            assert count == math.prod(shapes[0]) + k * (core + groups)
        assert taken[0] < 1.1 * math.prod(shapes[0])


def test_the_plan_of_many_terms_is_one_that_is_read_again() -> None:
    for options in ({"k": [32, 32, 32]}, {"rank": 8, "k": [4, 4, 4]}, {"params": "96%"}):
        plan = tiedconv.plan(MICRO.model(), "lors-adaptive", **CHANNEL, **options)
        check_plan(plan)


@pytest.mark.parametrize(
    ("options", "error", "code"),
    [
        ({}, NothingToConvert, "shape-missing"),
        ({"shape": [8]}, SchemeError, "invalid-shape"),
        ({"shape": [8, 0]}, SchemeError, "invalid-shape"),
        ({"shape": [7, 5]}, SchemeError, "not-a-generator"),
        ({"shape": [8, 8], "rank": 0}, SchemeError, "invalid-rank"),
        ({"shape": [8, 8], "rank": math.nan}, SchemeError, "invalid-rank"),
        ({"shape": [8, 8], "k": [1, 2]}, SchemeError, "wrong-rank-count"),
        ({"shape": [8, 8], "k": [1, 2, 33]}, SchemeError, "invalid-rank"),
        ({"shape": [8, 8], "k": [1, 2, -1]}, SchemeError, "invalid-rank"),
        ({"shape": [8, 8], "groups": "some"}, SchemeError, "invalid-groups"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, Any], error: type[TiedconvError], code: str
) -> None:
    with pytest.raises(error) as caught:
        tied(include=["*channel*"], **options)
    assert caught.value.code == code


def test_a_layer_that_is_not_a_generator_is_named() -> None:
    with raises(SchemeError, "not-a-generator"):
        tied(include=["*channel*"], shape=[7, 5])


# At run time


class Largest(TorchDispatchMode):
    """Notes the sizes of all tensors that are computed, but for views of those that are stored."""

    def __init__(self, stored: set[int]) -> None:
        super().__init__()
        self.stored = stored
        self.sizes: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            known = isinstance(tensor, Tensor) and (
                tensor.untyped_storage().data_ptr() in self.stored
            )
            if isinstance(tensor, Tensor) and not known:
                self.sizes.add(tensor.numel())
        return made


@pytest.mark.parametrize("options", [CHANNEL, SPATIAL], ids=["channel", "spatial"])
@pytest.mark.parametrize("train", [False, True])
def test_no_generator_is_made_in_a_forward_pass(options: dict[str, Any], train: bool) -> None:
    model = tied(**options).train(train)
    whole = next(e for _, _, _, e in tied_weights(model)).shape
    x = MICRO.input()[:1, :3]
    with Largest({p.untyped_storage().data_ptr() for p in model.parameters()}) as seen:
        y = MICRO.forward(model, x)
    # Three rows of features through layers whose own weights are smaller than the generator.
    assert max(seen.sizes) < math.prod(whole)
    if train:
        y.square().sum().backward()
    with Largest(set()) as seen:
        next(m for _, m, _, _ in tied_weights(model)).weight  # noqa: B018
    assert max(seen.sizes) == math.prod(whole)


def test_it_stays_so_in_copies_pickles_casts_and_when_cached_and_ends_with_the_tie() -> None:
    model = tied(**SPATIAL)
    before = MICRO.logits(model)
    forms = [
        model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model).double().float(), tiedconv.freeze(copy.deepcopy(model)),
    ]  # fmt: skip
    for one in forms:
        modules = [module for _, module, _, _ in tied_weights(one)]
        assert all(is_factored(module, "weight") for module in modules)
        assert all(type(module).__name__ == "Linear" for module in modules)
        assert not any(list(module.named_buffers()) for module in modules)
        assert torch.equal(MICRO.logits(one), before)
        assert sorted(apply_factors(one)) == sorted(state_of(one).plan.weights)
        assert torch.equal(MICRO.logits(one), before)
    plain = tiedconv.untie(copy.deepcopy(model))
    assert all(type(stage.spatial_generator) is nn.Linear for stage in plain.stages)
    assert torch.allclose(MICRO.logits(plain), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_and_exported_it_is_factored_too() -> None:
    model = tied(**SPATIAL)
    before = MICRO.logits(model)
    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        run = torch.compile(lambda x: MICRO.forward(model, x), fullgraph=True, backend="eager")
        assert torch.allclose(run(MICRO.input()), before, atol=1e-6)
        program = torch.export.export(model, (MICRO.input(),))
    assert torch.allclose(program.module()(MICRO.input()), before, atol=1e-6)
    whole = math.prod(next(e for _, _, _, e in tied_weights(model)).shape)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor) and value.shape[-1:] == (32,):
            assert value.numel() != whole
    assert sum(p.numel() for p in program.parameters()) == state_of(model).plan.stored


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(CHANNEL, id="channel"),
        pytest.param(SPATIAL, id="spatial", marks=pytest.mark.slow),
    ],
)
def test_onnx_applies_the_factors_and_holds_no_generator(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    ir = pytest.importorskip("onnx_ir")
    from tiedconv.exporters._onnx_lower import onnx_graph

    model = tied(**options)
    plan = state_of(model).plan
    graph, lowered = onnx_graph(copy.deepcopy(model), {"images": MICRO.input()})
    assert set(lowered.factored) == set(plan.weights)
    held = {n: v.const_value.numpy() for n, v in graph.graph.initializers.items()}
    assert plan.factors.keys() <= held.keys()
    ir.save(graph, tmp_path / "m.onnx")
    chosen = ort.SessionOptions()
    chosen.log_severity_level = 3
    chosen.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(tmp_path / "m.onnx", chosen, providers=["CPUExecutionProvider"])
    for x in (MICRO.input(), torch.randn(3, 5, 32)):
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            expected = MICRO.forward(model, x)
        assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-5)
    kept = ir.load(tmp_path / "optimised.onnx").graph.initializers.values()
    whole = math.prod(next(e for _, _, _, e in tied_weights(model)).shape)
    assert sum(v.const_value.size == whole for v in kept) == 1  # the base


def test_a_file_and_the_dense_form_give_the_same(tmp_path: Path) -> None:
    model = tied(**SPATIAL)
    tiedconv.save(model, tmp_path / "m.safetensors")
    loaded = tiedconv.load(tmp_path / "m.safetensors", model=MICRO.model())
    assert torch.equal(MICRO.logits(loaded), MICRO.logits(model))
    own = dict(model.named_parameters())
    for name, value in dense_state_dict(loaded).items():
        if name in state_of(model).plan.weights:
            expected = state_of(model).plan.weights[name].evaluate(own.__getitem__)
            assert torch.equal(value, expected)


def test_offsets_count_in_the_applied_form() -> None:
    model = tied(**CHANNEL)
    original = MICRO.model()
    own = original.state_dict()
    dense = dense_state_dict(model)
    offsets = {n: own[n] - dense[n] for n in state_of(model).plan.weights}
    before = MICRO.logits(model)
    set_offsets(model, offsets)
    assert torch.allclose(MICRO.logits(model), MICRO.logits(original), rtol=1e-3, atol=1e-5)
    scale_offsets(model, 0.0)
    assert torch.equal(MICRO.logits(model), before)
    clear_offsets(model)


def test_gradients_are_those_of_the_made_generator() -> None:
    model = tied(**SPATIAL).double()
    x = MICRO.input(torch.float64)
    MICRO.forward(model, x).square().sum().backward()
    made = copy.deepcopy(model)
    for parameter in made.parameters():
        parameter.grad = None
    for _, module, _, _ in list(tied_weights(made)):
        module.forward = lambda q, m=module: nn.functional.linear(q, m.weight, m.bias)
    MICRO.forward(made, x).square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), made.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, rtol=1e-7, atol=1e-9), name


# From scratch


def test_from_scratch_it_starts_at_the_base_and_every_factor_soon_moves() -> None:
    """B is 0, A and E are drawn: the private parts begin as nothing and are no dead end."""
    model = tied(**CHANNEL, scratch=True)
    first = MICRO.model().stages[0].channel_generator.weight
    for _, module, _, _ in tied_weights(model):
        assert torch.equal(module.weight, first)
    factors = {n: p for n, p in model.named_parameters() if n in state_of(model).plan.factors}
    start_at = {n: p.detach().clone() for n, p in factors.items()}
    assert all(not bool(p.any()) for n, p in factors.items() if "/B" in n)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        MICRO.forward(model, MICRO.input()).square().sum().backward()
        optimiser.step()
    for name, factor in factors.items():
        assert factor.grad is not None
        assert bool(factor.grad.any()), name
        assert not torch.equal(factor, start_at[name]), name
