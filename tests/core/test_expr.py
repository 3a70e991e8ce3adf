"""Laws of the expression algebra, on random well-typed expressions and on garbage."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiedconv.core.expr import (
    Add,
    Cat,
    Dequantize,
    Expr,
    MatMul,
    Mul,
    Permute,
    Ref,
    Reshape,
    Shape,
    Slice,
    reshape,
    transpose,
)
from tiedconv.core.expr_json import MAX_DEPTH, MAX_NODES, from_json
from tiedconv.core.packed_codes import WIDTHS, packed, packed_length, unpacked
from tiedconv.core.pad import Pad
from tiedconv.errors import PlanError

shapes = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)


@st.composite
def exprs(draw: st.DrawFn, shape: Shape | None = None, depth: int = 3) -> Expr:
    """A random expression of a given shape, built from its root down."""
    shape = draw(shapes) if shape is None else shape
    kinds = ["ref"]
    if depth:
        kinds += ["permute", "reshape", "add", "mul"]
        kinds += ["slice", "cat", "pad"] if shape else []
        kinds += ["matmul"] * 2 if len(shape) >= 2 else []
        kinds += ["dequantize"] if len(shape) == 2 else []
    kind = draw(st.sampled_from(kinds))

    def below(of: Shape) -> Expr:
        return draw(exprs(of, depth - 1))

    if kind == "permute":
        dims = draw(st.permutations(range(len(shape))))
        return Permute(below(tuple(shape[dims.index(d)] for d in range(len(shape)))), tuple(dims))
    if kind == "reshape":
        return Reshape(below(draw(factorings(math.prod(shape)))), shape)
    if kind in ("add", "mul"):
        a, b = shape, draw(narrowed(shape))
        if draw(st.booleans()):
            a, b = b, a
        return (Add if kind == "add" else Mul)(below(a), below(b))
    if kind == "matmul":
        inner = draw(st.integers(1, 4))
        batch, less = shape[:-2], draw(narrowed(shape[:-2]))
        batch, less = (less, batch) if draw(st.booleans()) else (batch, less)
        return MatMul(below((*batch, shape[-2], inner)), below((*less, inner, shape[-1])))
    if kind == "dequantize":
        width, bits = draw(st.integers(1, shape[1])), draw(st.sampled_from(WIDTHS))
        length = packed_length(math.prod(shape), bits)
        codes = Ref(f"tied/codes/{length}", (length,))
        return Dequantize(codes, below((shape[0], -(-shape[1] // width))), bits, shape[1])
    if kind == "slice":
        d = draw(st.integers(0, len(shape) - 1))
        before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
        whole = (*shape[:d], before + shape[d] + after, *shape[d + 1 :])
        return Slice(below(whole), d, before, before + shape[d])
    if kind == "pad":
        d = draw(st.integers(0, len(shape) - 1))
        kept = draw(st.integers(1, shape[d]))
        return Pad(below((*shape[:d], kept, *shape[d + 1 :])), d, shape[d])
    if kind == "cat":
        d = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(1, shape[d]))
        parts = [cut, shape[d] - cut] if cut < shape[d] else [cut]
        return Cat(tuple(below((*shape[:d], n, *shape[d + 1 :])) for n in parts), d)
    return Ref(f"tied/{'x'.join(map(str, shape))}/{draw(st.sampled_from('ab'))}", shape)


@st.composite
def factorings(draw: st.DrawFn, count: int) -> Shape:
    """A shape with a given number of elements."""
    found: list[int] = []
    while count > 1 and len(found) < 3:
        factor = draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
        found.append(factor)
        count //= factor
    return tuple(draw(st.permutations([*found, count])))


@st.composite
def narrowed(draw: st.DrawFn, shape: Shape) -> Shape:
    """A shape that broadcasts to the given one."""
    rest = shape[draw(st.integers(0, len(shape))) :]
    return tuple(n if draw(st.booleans()) else 1 for n in rest)


def stored_for(expr: Expr) -> dict[str, torch.Tensor]:
    """A tensor for every reference."""
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if "codes" in name
        else torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in sorted(expr.refs.items())
    }


def oracle(expr: Expr, stored: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """The same in NumPy, written from the docstrings."""
    match expr:
        case Ref(name=name):
            return stored[name].numpy()
        case Permute(x=x, dims=dims):
            return np.transpose(oracle(x, stored), dims)
        case Reshape(x=x, to=to):
            return np.reshape(oracle(x, stored), to, order="C")
        case Slice(x=x, dim=dim, start=start, stop=stop):
            return np.take(oracle(x, stored), range(start, stop), axis=dim)
        case Pad(x=x, dim=dim, size=size):
            inner = oracle(x, stored)
            ends = [(0, size - n if d == dim else 0) for d, n in enumerate(inner.shape)]
            return np.pad(inner, ends)
        case Cat(xs=xs, dim=dim):
            return np.concatenate([oracle(x, stored) for x in xs], axis=dim)
        case Add(a=a, b=b):
            return np.asarray(oracle(a, stored) + oracle(b, stored))
        case Mul(a=a, b=b):
            return np.asarray(oracle(a, stored) * oracle(b, stored))
        case MatMul(a=a, b=b):
            return np.asarray(oracle(a, stored) @ oracle(b, stored))
        case Dequantize(codes=codes, scales=scales, bits=bits, columns=columns):
            stream = np.unpackbits(oracle(codes, stored), bitorder="little")
            count = scales.shape[0] * columns
            each = stream[: count * bits].reshape(count, bits) @ (2 ** np.arange(bits))
            factor = oracle(scales, stored)
            width = -(-columns // factor.shape[1])
            whole = each.reshape(-1, columns) - 2.0 ** (bits - 1)
            return np.asarray(whole * np.repeat(factor, width, axis=1)[:, :columns])
    raise AssertionError(expr)


@given(st.sampled_from(WIDTHS), st.lists(st.integers(-128, 127), max_size=40))
def test_packing_keeps_every_integer_that_its_width_holds(bits: int, values: list[int]) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    whole = torch.tensor(values, dtype=torch.int64).clamp(low, high)
    codes = packed(whole, bits)
    assert codes.dtype == torch.uint8
    assert len(codes) == packed_length(len(values), bits)
    assert torch.equal(unpacked(codes, (len(values),), bits).long(), whole)


@given(exprs())
def test_json_round_trip_gives_an_equal_expression(expr: Expr) -> None:
    again = from_json(json.loads(json.dumps(expr.to_json())))
    assert again == expr
    assert again.shape == expr.shape
    assert hash(again) == hash(expr)


@given(exprs())
def test_evaluation_agrees_with_numpy_and_has_the_promised_shape(expr: Expr) -> None:
    stored = stored_for(expr)
    value = expr.evaluate(stored.__getitem__)
    assert tuple(value.shape) == expr.shape
    np.testing.assert_allclose(value.numpy(), oracle(expr, stored), rtol=1e-12, atol=1e-12)


@given(exprs())
def test_is_view_exactly_when_storage_is_shared(expr: Expr) -> None:
    stored = stored_for(expr)
    value = expr.evaluate(stored.__getitem__)
    owners = {t.untyped_storage().data_ptr() for t in stored.values()}
    assert expr.is_view == (value.untyped_storage().data_ptr() in owners)


@given(exprs())
def test_rename_changes_names_and_nothing_else(expr: Expr) -> None:
    renamed = expr.rename(lambda name: f"new-{name}")
    assert renamed.refs == {f"new-{name}": shape for name, shape in expr.refs.items()}
    assert renamed.rename(lambda name: name.removeprefix("new-")) == expr
    stored = stored_for(expr)
    value = renamed.evaluate(lambda name: stored[name.removeprefix("new-")])
    assert torch.equal(value, expr.evaluate(stored.__getitem__))


@given(exprs())
def test_evaluation_does_not_change_what_is_stored(expr: Expr) -> None:
    stored = stored_for(expr)
    before = {name: t.clone() for name, t in stored.items()}
    expr.evaluate(stored.__getitem__)
    assert all(torch.equal(before[name], t) for name, t in stored.items())


@given(exprs(), st.data())
def test_gradients_reach_every_stored_tensor(expr: Expr, data: st.DataObject) -> None:
    found = stored_for(expr)  # but codes, which are integers
    stored = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in found.items()}
    # What a slice leaves out gets a gradient of zeros, so every tensor has one.
    expr.evaluate(stored.__getitem__).sum().backward()
    assert all(t.grad is not None for t in stored.values() if t.is_floating_point())


def test_walk_goes_parents_first_and_copies_are_the_expression_itself() -> None:
    w = Ref("w", (2, 3))
    expr = Add(w, Mul(w, Ref("s", (2, 1))))
    assert [type(node).tag for node in expr.walk()] == ["add", "ref", "mul", "ref", "ref"]
    assert copy.deepcopy(expr) is expr


def test_two_transposes_cancel_and_a_reshape_to_the_same_shape_is_nothing() -> None:
    w = Ref("w", (2, 3))
    assert transpose(transpose(w)) is w
    assert transpose(w).shape == (3, 2)
    assert reshape(w, [2, 3]) is w
    assert reshape(w, [6]).shape == (6,)


W = Ref("w", (2, 3))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Permute(W, (0, 0)),
        lambda: Permute(W, (0,)),
        lambda: Permute(W, (0, -1)),
        lambda: Reshape(W, (5,)),
        lambda: Reshape(W, (-2, -3)),
        lambda: Slice(W, 2, 0, 1),
        lambda: Slice(W, -1, 0, 1),
        lambda: Slice(W, 0, 1, 1),
        lambda: Slice(W, 0, 0, 3),
        lambda: Cat((), 0),
        lambda: Cat((W, Ref("v", (2, 2))), 0),
        lambda: Cat((W, W), 2),
        lambda: Pad(W, 2, 5),
        lambda: Pad(W, -1, 5),
        lambda: Pad(W, 0, 1),
        lambda: Pad(W, 0, 2**62),
        lambda: Add(W, Ref("v", (2, 2))),
        lambda: Mul(W, Ref("v", (4, 1))),
        lambda: MatMul(W, W),
        lambda: MatMul(W, Ref("v", (3,))),
        lambda: Ref("w", (0, 3)),
        lambda: Ref("w", (-1,)),
        lambda: Ref("w", (2**21, 2**21)),
    ],
)
def test_an_ill_typed_node_cannot_be_built(build: Any) -> None:
    with pytest.raises(PlanError) as caught:
        build()
    assert caught.value.code in ("malformed-expression", "impossible-shape")


atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.sampled_from(
        ["ref", "permute", "reshape", "slice", "cat", "pad", "add", "mul", "matmul", ""]
    )
    | st.text(max_size=5)
)
garbage = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.tuples(st.sampled_from(["permute", "reshape", "cat"]), inner, inner).map(list)
        | st.tuples(st.just("ref"), st.text(max_size=3), inner).map(list)
        | st.tuples(st.sampled_from(["add", "mul", "matmul"]), inner, inner).map(list)
        | st.tuples(st.just("slice"), inner, inner, inner, inner).map(list)
    ),
    max_leaves=12,
)


def parse(data: Any) -> Expr | None:
    """The expression, or None if it is refused as it should be."""
    try:
        return from_json(data)
    except PlanError:
        return None


@pytest.mark.slow
@settings(max_examples=300)
@given(garbage)
def test_garbage_is_an_expression_or_a_plan_error(data: Any) -> None:
    found = parse(data)
    assert found is None or found.to_json() == data


@given(exprs(), garbage, st.data())
def test_a_damaged_expression_is_an_expression_or_a_plan_error(
    expr: Expr, wrong: Any, data: st.DataObject
) -> None:
    tree = expr.to_json()
    places = list(lists_in(tree))
    place = data.draw(st.sampled_from(places))
    if place:
        place[data.draw(st.integers(0, len(place) - 1))] = wrong
    found = parse(tree)
    assert found is None or found.to_json() == tree


def lists_in(tree: list[Any]) -> Any:
    """Every list of a nested list."""
    yield tree
    for item in tree:
        if isinstance(item, list):
            yield from lists_in(item)


def nested(tag: str, depth: int) -> list[Any]:
    data: list[Any] = ["ref", "w", [2, 2]]
    for _ in range(depth):
        data = ["permute", data, [1, 0]] if tag == "permute" else [data]
    return data


@pytest.mark.parametrize(
    "data",
    [
        ["ref", "w", [True, 2]],
        ["ref", "w", [2.0, 2]],
        ["ref", "w", ["2"]],
        ["ref", "w", [-2, 2]],
        ["ref", "w", [0]],
        ["ref", "w", [2**41]],
        ["ref", "w", [2**30, 2**30]],
        ["ref", "w", [1] * 9],
        ["ref", 3, [2]],
        ["ref", "w"],
        ["slice", ["ref", "w", [4]], 0, False, 2],
        ["slice", ["ref", "w", [4]], 0, 2],
        ["permute", ["ref", "w", [2, 2]], [True, False]],
        ["cat", [], 0],
        ["cat", [["ref", "w", [2]]], True],
        ["cat", [["ref", "w", [2**39]]] * 4, 0],
        ["call", "os.system", "true"],
        {"ref": "w"},
        None,
        "ref",
        nested("permute", MAX_DEPTH + 1),
        nested("permute", 5_000),
        nested("list", 5_000),
        ["ref", "w", [nested("list", 5_000)]],
        ["cat", [["ref", "w", [2]]] * MAX_NODES, 0],
        ["cat", [["ref", "w", [2]]] * 100_000, 0],
    ],
)
def test_malformed_json_is_refused(data: Any) -> None:
    with pytest.raises(PlanError) as caught:
        from_json(data)
    assert caught.value.code in ("malformed-expression", "impossible-shape", "plan-too-large")


def test_the_limits_leave_room_for_what_they_name() -> None:
    assert from_json(nested("permute", MAX_DEPTH)).shape == (2, 2)
    many = ["cat", [["ref", "w", [2]]] * (MAX_NODES - 1), 0]
    assert from_json(many).shape == (2 * (MAX_NODES - 1),)


def test_an_expression_that_grows_like_a_power_of_two_is_refused_quickly() -> None:
    data: Any = ["ref", "w", [2]]
    for _ in range(MAX_DEPTH):
        data = ["add", data, data]
    with pytest.raises(PlanError) as caught:
        from_json(data)
    assert caught.value.code == "plan-too-large"


def doubles(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("trained", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_scales_of_rows_and_columns_have_the_gradients_of_plain_products(
    transposed: bool, trained: tuple[int, ...]
) -> None:
    w, s, t = Ref("w", (5, 3)), Ref("s", (5, 1)), Ref("t", (1, 3))
    expr: Expr = Mul(Mul(w, s), t)
    stored = {"w": doubles(5, 3), "s": doubles(5, 1), "t": doubles(1, 3)}
    for tensor, wanted in zip(stored.values(), trained, strict=True):
        tensor.requires_grad_(bool(wanted))

    def value(*tensors: torch.Tensor) -> torch.Tensor:
        found = expr.evaluate(dict(zip("wst", tensors, strict=True)).__getitem__)
        return found.T if transposed else found

    assert torch.equal(value(*stored.values()), value(*(x.detach() for x in stored.values())))
    # Also a gradient that lies the other way, and one that others read as well.
    weight = doubles(*value(*stored.values()).shape).T.contiguous().T
    aim = (value(*stored.values()) * weight).sum()
    plain = stored["w"] * stored["s"] * stored["t"]
    wanted = ((plain.T if transposed else plain) * weight).sum()
    kept = weight.clone()
    sources = [x for x in stored.values() if x.requires_grad]
    for one, other in zip(
        torch.autograd.grad(aim, sources), torch.autograd.grad(wanted, sources), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert torch.equal(weight, kept)
    assert torch.autograd.gradcheck(value, tuple(stored.values()))
    assert torch.autograd.gradgradcheck(value, tuple(stored.values()))


def test_the_gradient_that_others_read_too_is_left_as_it_is() -> None:
    w, s, t = doubles(4, 3).requires_grad_(), doubles(4, 1), doubles(1, 3)
    expr = Mul(Mul(Ref("w", (4, 3)), Ref("s", (4, 1))), Ref("t", (1, 3)))
    value = expr.evaluate({"w": w, "s": s, "t": t}.__getitem__)
    beside = doubles(4, 3).requires_grad_()
    upstream = doubles(3, 4).T  # lies the other way; both summands are given this very tensor
    (value + beside).backward(upstream)
    assert torch.equal(beside.grad, upstream)
    torch.testing.assert_close(w.grad, upstream * s * t)
