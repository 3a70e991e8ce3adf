"""Factors applied one by one give the outputs of the weight."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Ref, Reshape, Slice, transpose
from tiedconv.core.pad import padded
from tiedconv.core.part import part
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.factored import (
    NotFactorableError,
    apply,
    matrix_of,
)
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.factored_torch import Features
from tiedconv.runtime.flops import apply_flops, apply_macs, materialize_flops, reads_transposed
from tiedconv.runtime.tie import (
    clear_offsets,
    freeze,
    is_frozen,
    scale_offsets,
    set_offsets,
    state_of,
    tied_weights,
)

SIZES = st.integers(1, 4)


class Grower:
    """Draws expressions of a wanted shape, over tensors that it keeps."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.tensors: dict[str, Tensor] = {}

    def ref(self, rows: int, columns: int) -> Ref:
        name = f"t{len(self.tensors)}"
        generator = torch.Generator().manual_seed(len(self.tensors))
        shape = (rows, columns)
        self.tensors[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
        return Ref(name, shape)

    def matrix(self, rows: int, columns: int, depth: int) -> Expr:
        kinds = ["ref", "slice"]
        if depth:
            kinds += ["turn", "product", "sum", "rows", "columns", "number", "cat0", "cat1", "pad"]
        inner = depth - 1
        match self.draw(st.sampled_from(kinds)):
            case "slice":
                return Slice(self.ref(rows + 2, columns), 0, 1, 1 + rows)
            case "turn":
                return transpose(self.matrix(columns, rows, inner))
            case "product":
                rank = self.draw(SIZES)
                return MatMul(self.matrix(rows, rank, inner), self.matrix(rank, columns, inner))
            case "sum":
                return Add(self.matrix(rows, columns, inner), self.matrix(rows, columns, inner))
            case "rows":
                return Mul(self.matrix(rows, columns, inner), self.ref(rows, 1))
            case "columns":
                return Mul(self.matrix(rows, columns, inner), self.ref(1, columns))
            case "number":
                return Mul(self.matrix(rows, columns, inner), self.ref(1, 1))
            case "pad":
                kept = self.draw(st.integers(1, rows)), self.draw(st.integers(1, columns))
                return padded(padded(self.matrix(*kept, inner), 1, columns), 0, rows)
            case "cat0":
                parts = (self.matrix(1, columns, inner), self.matrix(rows, columns, inner))
                return (
                    Slice(self.ref(rows, columns), 0, 0, rows)
                    if rows == 1
                    else Cat((parts[0], self.matrix(rows - 1, columns, inner)), 0)
                )
            case "cat1" if columns > 1:
                return Cat((self.matrix(rows, 1, inner), self.matrix(rows, columns - 1, inner)), 1)
        return self.ref(rows, columns)


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Expr, dict[str, Tensor]]:
    grower = Grower(draw)
    return grower.matrix(draw(SIZES), draw(SIZES), draw(st.integers(0, 3))), grower.tensors


@given(expressions(), st.booleans())
def test_applying_is_multiplying_with_the_matrix(
    drawn: tuple[Expr, dict[str, Tensor]], transposed: bool
) -> None:
    expr, tensors = drawn
    whole = expr.evaluate(tensors.__getitem__)
    x = torch.randn(3, whole.shape[0 if transposed else 1], dtype=torch.float64)
    features = Features(lambda e: e.evaluate(tensors.__getitem__))
    found = apply(expr, x, features, transposed)
    expected = x @ whole if transposed else x @ whole.t()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert (apply_flops(expr) or 0) >= 1


@given(expressions(), st.integers(0, 1), st.data())
def test_a_part_of_a_matrix_is_one_of_its_factors(
    drawn: tuple[Expr, dict[str, Tensor]], dim: int, data: st.DataObject
) -> None:
    expr, tensors = drawn
    size = expr.shape[dim]
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    found = part(expr, dim, start, stop)
    whole = expr.evaluate(tensors.__getitem__)
    assert torch.allclose(
        found.evaluate(tensors.__getitem__), whole.narrow(dim, start, stop - start)
    )
    assert found.shape == whole.narrow(dim, start, stop - start).shape
    # Of nothing but zeros there are no factors.
    assert apply_flops(found) is not None or not found.evaluate(tensors.__getitem__).any()


def test_a_kernel_that_is_not_a_reshaped_matrix_must_be_materialized() -> None:
    with pytest.raises(NotFactorableError):
        matrix_of(Reshape(transpose(Ref("w", (6, 4))), (2, 3, 2, 2)))
    assert apply_flops(Add(Ref("w", (3, 4)), Ref("v", (1, 4)))) is None
    assert matrix_of(Ref("w", (2, 3, 2, 2))).shape == (2, 12)


def test_multiplications_are_counted_on_shapes() -> None:
    b, a, base = Ref("b", (6, 2)), Ref("a", (2, 8)), Ref("base", (6, 8))
    assert apply_flops(MatMul(b, a)) == 6 * 2 + 2 * 8
    assert apply_flops(Add(base, MatMul(b, a))) == 6 * 8 + 6 * 2 + 2 * 8
    assert apply_flops(Mul(transpose(base), Ref("s", (8, 1)))) == 6 * 8 + 8
    assert materialize_flops(Add(base, MatMul(b, a))) == 6 * 2 * 8 + 6 * 8
    assert reads_transposed(transpose(base))
    assert not reads_transposed(base)


WAYS = [
    ("timm-vit", "tied", {}),
    ("timm-vit", "tied", {"params": "60%"}),
    ("timm-vit", "lors", {"rank": 2}),
    ("timm-vit", "lors", {"bases": 2, "rank": 0.1, "groups": "adjacent:3"}),
    ("timm-vit", "basis", {"params": "70%", "tie": True}),
    ("torchvision-vit", "lowrank", {"params": "60%"}),
    ("hf-vit", "basis", {"params": "70%"}),
    ("perceptron", "lowrank", {"rank": 2}),
]


@pytest.mark.parametrize(("name", "scheme", "options"), WAYS)
def test_applied_factors_give_the_outputs_of_the_weights_and_untie_undoes_them(
    name: str, scheme: str, options: dict[str, object]
) -> None:
    micro = all_micros()[name]
    model = tiedconv.convert(micro.model(), scheme, **options)
    expected = micro.logits(model)
    applied = apply_factors(model)
    able = {
        n for n, module, attribute, expr in tied_weights(model)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention) and not expr.is_view
    }  # fmt: skip
    assert set(applied) == able
    assert applied
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(micro.logits(other), expected, rtol=1e-4, atol=1e-5)
    # Untied, it is a plain model again, with gradients and without, in training and evaluation.
    tiedconv.untie(model)
    assert not any("_tiedconv" in key for m in model.modules() for key in vars(m))
    x = micro.input()
    for training in (False, True):
        model.train(training)
        with torch.no_grad():
            assert torch.allclose(micro.forward(model, x), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(micro.forward(model, x), expected, rtol=1e-4, atol=1e-5)


def test_applied_again_with_fewer_rows_it_chooses_again() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lors", rank=2)
    assert apply_factors(model)
    assert not apply_factors(model, rows=10**6)
    assert not [n for n, m, _, _ in tied_weights(model) if type(m).forward is not nn.Linear.forward
                and isinstance(m, nn.Linear)]  # fmt: skip


KERNELS: list[tuple[int, dict[str, Any], bool]] = [
    (1, {}, True),
    (1, {"stride": (2, 1)}, True),
    (1, {"padding": 1}, False),
    (3, {"padding": 1}, True),
    (3, {"padding": "same", "dilation": 2, "bias": False}, True),
    (3, {"stride": 2, "padding": 1, "padding_mode": "reflect"}, False),
    (3, {"groups": 2}, False),
    (4, {"stride": 2}, True),
]


@pytest.mark.parametrize(("size", "options", "able"), KERNELS)
@pytest.mark.parametrize("scheme", ["lowrank", "lors", "basis"])
def test_convolutions_apply_factors(
    size: int, options: dict[str, Any], able: bool, scheme: str
) -> None:
    torch.manual_seed(0)
    stack = nn.Sequential(*(nn.Conv2d(16, 16, size, **options) for _ in range(3)))
    model = tiedconv.convert(stack, scheme, example=torch.randn(1, 16, 32, 32)).eval()
    x = torch.randn(2, 16, 40, 64)
    with torch.no_grad():
        expected = model(x)
        assert bool(apply_factors(model)) == able
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
        assert torch.allclose(model(x[0]), expected[0], rtol=1e-4, atol=1e-5)
        compiled = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(model(x).square().sum(), next(model.parameters()))[0]
    assert gradient.abs().sum() > 0
    tiedconv.untie(model)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


ATTENTIONS: list[dict[str, Any]] = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 24, "vdim": 40},
    {"add_bias_kv": True, "add_zero_attn": True},
]


@pytest.mark.parametrize("options", ATTENTIONS)
@pytest.mark.parametrize("needs_weights", [False, True])
def test_attentions_apply_factors(options: dict[str, Any], needs_weights: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({str(i): nn.MultiheadAttention(32, 2, **options) for i in range(2)})
    example = torch.randn(4, 3, 32)  # nothing is run here: the attentions are called below
    tied = tiedconv.convert(model, "lowrank", rank=3).eval()
    attention = tied["0"]
    assert isinstance(attention, nn.MultiheadAttention)
    widths = [32, options.get("kdim", 32), options.get("vdim", 32)]
    inputs = [torch.randn(4, 3, width) for width in widths]
    alike = [example] * 3 if widths == [32] * 3 else inputs
    with torch.no_grad():
        for given in (inputs, alike):
            attention.train(False)
            expected = attention(*given, need_weights=needs_weights)
            names = apply_factors(tied)
            assert "0.out_proj.weight" in names
            found = attention(*given, need_weights=needs_weights)
            assert torch.allclose(found[0], expected[0], atol=1e-5)
            assert (found[1] is None) == (expected[1] is None)
            apply_factors(tied, rows=10**9)
    tiedconv.untie(tied)
    assert type(tied["0"]) is nn.MultiheadAttention


class ReadsTheType(nn.Module):
    """Reads the type of a layer's weight, as transformers do, and computes with it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 16)` to the same."""
        for layer in self.layers:
            assert layer.weight.shape == (16, 16)
            x = layer(x.to(layer.weight.dtype))
        return x + self.layers[0].weight.sum()


def test_a_weight_is_evaluated_only_where_something_is_computed_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiedconv.convert(ReadsTheType(), "lowrank", rank=2, example=torch.randn(1, 16)).eval()
    x = torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    apply_factors(model)
    evaluated: list[Expr] = []
    evaluate = MatMul.evaluate
    monkeypatch.setattr(
        MatMul, "evaluate", lambda self, lookup: (evaluated.append(self), evaluate(self, lookup))[1]
    )
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(evaluated) == 1


def test_a_factor_that_parts_share_is_multiplied_once() -> None:
    b, c, a = Ref("b", (6, 2)), Ref("c", (3, 2)), Ref("a", (2, 8))
    joined = Cat((MatMul(b, a), MatMul(c, a)), 0)
    assert apply_macs(joined) == 2 * 8 + 6 * 2 + 3 * 2
    assert apply_macs(transpose(joined)) == 6 * 2 + 3 * 2 + 2 * 8


def test_for_the_fewest_multiply_adds_some_weights_are_cached() -> None:
    micro = all_micros()["timm-vit"]
    rules = [Rule("lowrank", {"rank": 2}, ("*mlp*",)), Rule("lors", {}, ("*attn*",))]
    model = tiedconv.convert(micro.model(), recipe=Recipe(tuple(rules)))
    expected = micro.logits(model)
    applied = apply_factors(model, cache=True)
    assert applied
    assert all("mlp" in name for name in applied)
    for name, module, attribute, _ in tied_weights(model):
        assert is_frozen(module, attribute) == (name not in applied)
    assert torch.allclose(micro.logits(model), expected, rtol=1e-4, atol=1e-5)
    tiedconv.untie(model)
    assert torch.allclose(micro.logits(model), expected, rtol=1e-4, atol=1e-5)


def test_offsets_count_with_factors_applied() -> None:
    micro = all_micros()["timm-vit"]
    model = tiedconv.convert(micro.model(), "lors", rank=2)
    compact = micro.logits(model)
    assert apply_factors(model)
    generator = torch.Generator().manual_seed(0)
    shapes = state_of(model).plan.weights
    offsets = {n: 0.1 * torch.randn(e.shape, generator=generator) for n, e in shapes.items()}
    set_offsets(model, offsets, 0.5)
    x = micro.input()
    assert not any(isinstance(m, nn.Dropout) and m.p for m in model.modules())
    training = micro.forward(model.train(), x).detach()
    with torch.no_grad():
        evaluated = micro.forward(model.eval(), x)
    assert torch.allclose(evaluated, training, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(evaluated, compact, atol=1e-3)
    for without in (lambda: scale_offsets(model, 0.0), lambda: clear_offsets(model)):
        without()
        assert torch.allclose(micro.logits(model), compact, rtol=1e-4, atol=1e-5)


def test_no_weight_is_materialized(monkeypatch: pytest.MonkeyPatch) -> None:
    micro = all_micros()["timm-vit"]
    model = tiedconv.convert(micro.model(), "lowrank", rank=2)
    apply_factors(model)

    def forbidden(self: MatMul, lookup: object) -> Tensor:
        raise AssertionError("a weight was materialized")

    monkeypatch.setattr(MatMul, "evaluate", forbidden)
    micro.logits(model)


def test_training_and_cached_models_use_weights_as_before() -> None:
    micro = all_micros()["timm-vit"]
    model = tiedconv.convert(micro.model(), "lors", rank=2)
    plain = copy.deepcopy(model)
    apply_factors(model)
    x = micro.input()
    for one in (model, plain):
        one.train()
        one(x).square().sum().backward()
    for name in state_of(model).plan.factors:
        mine, other = model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)
    assert torch.equal(micro.logits(freeze(model)), micro.logits(freeze(plain)))


def test_with_few_rows_factors_are_applied_where_that_takes_fewer_multiplications() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lors", rank=2)
    weights = {n: e for n, _, _, e in tied_weights(model)}
    few = apply_factors(copy.deepcopy(model), rows=1)
    many = apply_factors(copy.deepcopy(model), rows=10**6)
    assert set(few) == set(weights)  # materialising costs more than one row's products
    assert not many  # a base and a residual take more products than the weight
    low = tiedconv.convert(
        all_micros()["timm-vit"].model(), "lowrank", rank=2, include=["blocks.*"]
    )
    for name, _, _, expr in tied_weights(low):
        cheaper = (apply_flops(expr) or math.inf) < math.prod(expr.shape)
        assert (name in apply_factors(copy.deepcopy(low), rows=10**6)) == cheaper


def test_a_report_says_what_applying_takes() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lowrank", rank=2)
    weights = {n: e for n, _, _, e in tied_weights(model)}
    taken = sum(apply_flops(e) or 0 for e in weights.values())
    whole = sum(math.prod(e.shape) for e in weights.values())
    assert tiedconv.report(model).factored_flops == pytest.approx(taken / whole)
    assert tiedconv.report(tiedconv.convert(nn.Sequential(
        *(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))), "shared",
    )).factored_flops == 1.0  # fmt: skip
