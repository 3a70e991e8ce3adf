"""Slots, the assembly of tensors from slots, and plans as data."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from micro import MEANT_FOR, all_micros

import tiedconv
from tiedconv.core.assemble import assemble, member_expr
from tiedconv.core.expr import Add, Expr, MatMul, Mul, Ref
from tiedconv.core.options import current_options
from tiedconv.core.plan import Member, Plan, Slot, Span, stored_name
from tiedconv.errors import PlanError, SchemeError
from tiedconv.planning.recipe import Recipe
from tiedconv.schemes import all_schemes, make_scheme


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_a_linear_layer_is_its_own_matrix() -> None:
    slot = Slot.whole("fc.weight", (5, 3))
    assert (slot.rows, slot.columns, slot.kernel, slot.numel) == (5, 3, (), 15)
    assert torch.equal(slot.matrix_of(numbered(5, 3)), numbered(5, 3))


def test_a_convolution_is_out_by_in_times_kernel() -> None:
    slot = Slot.whole("conv.weight", (4, 2, 3, 3))
    assert slot.matrix_shape == (4, 18)
    assert slot.kernel == (3, 3)
    kernel = numbered(4, 2, 3, 3)
    assert torch.equal(slot.matrix_of(kernel), kernel.flatten(1))
    assert (
        slot.matrix_of(kernel).untyped_storage().data_ptr() == kernel.untyped_storage().data_ptr()
    )


def test_a_fused_qkv_is_three_slots_by_rows() -> None:
    fused = numbered(6, 2)
    q, k, v = (Slot("qkv", (6, 2), i, i + 2) for i in (0, 2, 4))
    assert torch.equal(torch.cat([s.matrix_of(fused) for s in (q, k, v)]), fused)


def test_a_conv1d_is_stored_transposed() -> None:
    stored = numbered(3, 6)  # (in, 3 * out)
    whole = Slot.whole("c_attn.weight", (3, 6), transposed=True)
    assert whole.matrix_shape == (6, 3)
    assert torch.equal(whole.matrix_of(stored), stored.t())
    k = Slot("c_attn.weight", (3, 6), 2, 4, transposed=True)
    assert k.matrix_shape == (2, 3)
    assert torch.equal(k.matrix_of(stored), stored[:, 2:4].t())


def test_a_flipped_member_takes_part_as_its_transpose() -> None:
    slot = Slot.whole("w", (5, 3))
    member = Member(slot, flip=True)
    assert member.shape == (3, 5)
    assert torch.equal(member.matrix_of(numbered(5, 3)), numbered(5, 3).t())
    assert member_expr(member, Ref("W", (3, 5))).shape == (5, 3)
    assert torch.equal(Span("b", 1, 3).of(numbered(4)), torch.tensor([1.0, 2.0]))


@st.composite
def partly_covered(draw: st.DrawFn) -> tuple[list[Slot], tuple[int, ...], bool]:
    """Slots of one tensor that leave gaps, in any order."""
    transposed = draw(st.booleans())
    rows, columns = draw(st.integers(2, 9)), draw(st.integers(1, 3))
    kernel = () if transposed else draw(st.sampled_from([(), (3, 3), (1, 1), (2, 1, 2)]))
    shape = (columns, rows) if transposed else (rows, columns, *kernel)
    cuts = sorted(draw(st.sets(st.integers(0, rows), min_size=2)))
    pieces = [Slot("t", shape, a, b, transposed) for a, b in itertools.pairwise(cuts)]
    chosen = draw(st.lists(st.sampled_from(pieces), min_size=1, unique=True))
    return chosen, shape, transposed


@given(partly_covered())
def test_assemble_puts_every_row_in_its_place_and_stores_the_gaps(
    case: tuple[list[Slot], tuple[int, ...], bool],
) -> None:
    slots, shape, transposed = case
    original = torch.randn(shape)
    stored = {f"tied/{s.start}": s.matrix_of(original) for s in slots}
    expr, rest = assemble([(s, Ref(f"tied/{s.start}", s.matrix_shape)) for s in slots])
    stored |= {name: s.matrix_of(original) for name, s in rest.items()}
    assert expr.shape == shape
    assert torch.equal(expr.evaluate(stored.__getitem__), original)
    rows = shape[1] if transposed else shape[0]
    assert sum(s.rows for s in slots) + sum(s.rows for s in rest.values()) == rows


def test_a_tensor_covered_by_one_slot_stays_a_view() -> None:
    for slot in (Slot.whole("c", (4, 2, 1, 1)), Slot.whole("c1d", (4, 2), transposed=True)):
        expr, rest = assemble([(slot, Ref("tied/c/W", slot.matrix_shape))])
        assert expr.is_view
        assert not rest


def test_two_groups_cannot_give_the_same_rows() -> None:
    a, b = Slot("t", (4, 2), 0, 3), Slot("t", (4, 2), 2, 4)
    with pytest.raises(PlanError) as caught:
        assemble([(a, Ref("A", (3, 2))), (b, Ref("B", (2, 2)))])
    assert caught.value.code == "overlapping-slots"


@pytest.mark.parametrize(
    "data",
    [
        ["t", [4, 2], 0, 5, False],
        ["t", [4, 2], 2, 2, False],
        ["t", [4, 2], -1, 2, False],
        ["t", [4, 2], 0, 4, True],
        ["t", [4], 0, 4, False],
        ["t", [4, 0], 0, 4, False],
        ["t", [True, 2], 0, 1, False],
        ["t", [4, 2], 0, 4],
        ["t", [4, 2], 0, 4, 1],
        [3, [4, 2], 0, 4, False],
        None,
        {},
    ],
)
def test_a_malformed_slot_is_refused(data: Any) -> None:
    with pytest.raises(PlanError) as caught:
        Slot.from_json(data)
    assert caught.value.code == "malformed-plan"


@pytest.mark.parametrize("scheme", all_schemes())
def test_a_plan_survives_json(scheme: str) -> None:
    of, options = MEANT_FOR.get(scheme, (None, {}))
    for name in (of,) if of else ("timm-vit", "hf-imagegpt", "torchvision-resnet", "aliased"):
        if scheme == "auto":
            options = {"params": "70%"}  # not every model can be halved
        plan = tiedconv.plan(all_micros()[name].model(), scheme, **options)
        # A file is sorted, and so is the plan: an order of tensors decides the last bits.
        again = Plan.from_json(json.loads(json.dumps(plan.to_json(), sort_keys=True)))
        assert again == plan
        assert [*again.weights, *again.factors] == [*plan.weights, *plan.factors]
        assert again.to_json() == plan.to_json()
        assert (again.stored, again.original) == (plan.stored, plan.original)


def test_a_former_name_of_an_option_is_read_and_the_current_one_written() -> None:
    data = tiedconv.plan(all_micros()["timm-vit"].model(), "tied", base_rank=0.5).to_json()
    old = json.loads(json.dumps(data).replace('"base_rank"', '"core"'))
    assert any("core" in group["options"] for group in old["groups"])
    assert Plan.from_json(old).to_json() == data
    assert current_options({"core": 3, "rank": 1}) == {"base_rank": 3, "rank": 1}
    assert make_scheme("tied", {"core": 3}) == make_scheme("tied", {"base_rank": 3})
    assert Recipe.of("lors", core=0.5) == Recipe.of("lors", base_rank=0.5)
    with pytest.raises(SchemeError) as caught:
        make_scheme("tied", {"core": 3, "base_rank": 3})
    assert caught.value.code == "option-given-twice"


def test_stored_names_hold_no_dot() -> None:
    assert stored_name("blocks.3.mlp", "W") == "tied/blocks/3/mlp/W"


def small() -> Plan:
    """A plan with a tied pair, a kept tensor, a buffer and an alias."""
    w = Ref("tied/g/W", (4, 2))
    weights: dict[str, Expr] = {"a.weight": w, "b.weight": MatMul(w, Ref("tied/g/A", (2, 4)))}
    kept = {"a.bias": (4,), "bn.running_mean": (4,)}
    return Plan(weights, (), kept, frozenset({"bn.running_mean"}), {"c.bias": "a.bias"})


def test_a_sound_plan_is_valid_and_counts_parameters_without_buffers() -> None:
    plan = small()
    plan.validate()
    assert plan.stored == 8 + 8 + 4
    assert plan.original == 8 + 16 + 4
    assert copy.deepcopy(plan) is plan


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (
            {"kept": {"a.bias": (4,), "a.weight": (4, 2), "bn.running_mean": (4,)}},
            "duplicate-tensor",
        ),
        ({"aliases": {"a.weight": "a.bias"}}, "duplicate-tensor"),
        ({"aliases": {"c.bias": "nowhere"}}, "invalid-alias"),
        ({"aliases": {"a.bias": "bn.running_mean"}}, "invalid-alias"),
        ({"buffers": frozenset({"other"})}, "unknown-buffer"),
        ({"weights": {"a.weight": Ref("tied/g.W", (4, 2))}}, "invalid-factor"),
        ({"weights": {"a.weight": Ref("other/W", (4, 2))}}, "invalid-factor"),
        ({"weights": {"a.weight": Ref("a.bias", (4,))}}, "invalid-factor"),
        (
            {"weights": {"a": Ref("tied/W", (4, 2)), "b": Ref("tied/W", (2, 4))}},
            "contradictory-plan",
        ),
    ],
)
def test_a_plan_that_does_not_hang_together_is_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(PlanError) as caught:
        dataclasses.replace(small(), **changes).validate()
    assert caught.value.code == code


def test_groups_and_expressions_must_agree_about_factors() -> None:
    plan = tiedconv.plan(all_micros()["timm-vit"].model(), "tied")
    group = plan.groups[0]
    wrong = dataclasses.replace(group, factors={**group.factors, "W": (1, 1)})
    with pytest.raises(PlanError) as caught:
        dataclasses.replace(plan, groups=(wrong, *plan.groups[1:])).validate()
    assert caught.value.code == "contradictory-plan"


def test_one_expression_that_reads_a_tensor_in_two_shapes_is_refused() -> None:
    expr = Add(Ref("tied/W", (4, 2)), Mul(Ref("tied/W", (4, 1)), Ref("tied/W", (1, 2))))
    with pytest.raises(PlanError) as caught:
        dataclasses.replace(small(), weights={"a.weight": expr}).validate()
    assert caught.value.code == "contradictory-plan"


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = tiedconv.plan(all_micros()["timm-vit"].model(), "lors").to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("kept"),
        lambda d: d.update(more=1),
        lambda d: d.update(weights=[]),
        lambda d: d.update(groups={}),
        lambda d: d["weights"].update(x=["exec", "rm"]),
        lambda d: d["kept"].update(x=3),
        lambda d: d["kept"].update(x=[2.5]),
        lambda d: d["kept"].update(x=[True]),
        lambda d: d["groups"].append(None),
        lambda d: d["groups"].append([]),
        lambda d: d["groups"][0].pop("members"),
        lambda d: d["groups"][0].update(members=[[]]),
        lambda d: d["groups"][0].update(members=[3]),
        lambda d: d["groups"][0].update(factors={"base": "x"}),
        lambda d: d["groups"][0].update(error="x"),
        lambda d: d["aliases"].update(x=[]),
        lambda d: d["buffers"].append("x"),
        lambda d: d["buffers"].append([]),
        lambda d: d["kept"].update({"x.bias": [-3]}),
    ],
)
def test_malformed_plans_are_plan_errors(change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(broken(change))
    assert caught.value.code in ("malformed-plan", "malformed-expression", "unknown-buffer")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(["weights", "groups", "kept", "buffers", "aliases"]),
)
def test_a_plan_with_any_garbage_in_it_is_a_plan_or_a_plan_error(garbage: Any, key: str) -> None:
    data = {**small().to_json(), key: garbage}
    try:
        plan = Plan.from_json(data)
    except PlanError:
        return
    assert plan.to_json() == data
