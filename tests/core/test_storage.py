"""Storage formats on plans: what is stored, what expressions read, what is refused."""

from __future__ import annotations

import pytest
import torch
from error_codes import raises
from micro import all_micros
from planning_helpers import make_plan

from tiedconv.core.expr import Dequantize
from tiedconv.core.packed_codes import packed
from tiedconv.core.plan import Plan
from tiedconv.core.storage import IntFormat, quantized
from tiedconv.errors import PlanError
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.recipe import Recipe


def plan_of(scheme: str) -> Plan:
    plan, _ = make_plan(inspect_model(all_micros()["timm-vit"].model()), Recipe.of(scheme))
    return plan


@pytest.mark.parametrize("scheme", ["tied", "lors", "lowrank"])
@pytest.mark.parametrize("format_", [IntFormat(4), IntFormat(3, 8), IntFormat(8, 0, True)])
def test_weights_keep_their_shapes_and_parameters_are_counted(
    scheme: str, format_: IntFormat
) -> None:
    plan = plan_of(scheme)
    names = [*plan.factors, *(n for n, s in plan.kept.items() if len(s) > 1)]
    names = [n for n in names if len({**plan.factors, **plan.kept}[n]) > 1]
    found = quantized(plan, dict.fromkeys(names, format_))
    for name, expr in plan.weights.items():
        assert found.weights[name].shape == expr.shape
    assert found.original == plan.original
    assert len(found.codes) == len(names)
    assert found.stored > plan.stored  # by the scales alone
    assert found.stored - plan.stored < plan.stored / 2
    assert Plan.from_json(found.to_json()) == found


def test_values_are_codes_times_scales_by_group_and_column() -> None:
    format_ = IntFormat(3, 4, True)
    expr = format_.expression("tied/w", 2, 6)
    whole = torch.tensor([[-4, 3, 0, 1, 2, -1], [1, 1, 1, 1, 1, 1]])
    scales = torch.tensor([[0.5, 2.0], [1.0, 3.0]])
    columns = torch.tensor([[1.0, 1.0, 1.0, 10.0, 1.0, 1.0]])
    stored = {
        "tied/w/codes": packed(whole, 3), "tied/w/scales": scales, "tied/w/columns": columns,
    }  # fmt: skip
    # Two groups of three columns: equal widths, of four at most.
    expected = whole * scales.repeat_interleave(3, 1) * columns
    assert torch.equal(expr.evaluate(stored.__getitem__), expected)
    assert {n: tuple(t.shape) for n, t in stored.items()} == format_.tensors("tied/w", 2, 6)


def test_what_can_not_be_integers_is_refused() -> None:
    plan = plan_of("tied")
    for name in ("nothing", next(iter(plan.weights))):
        with raises(PlanError, "unknown-tensor"):
            quantized(plan, {name: IntFormat(4)})
    with raises(PlanError, "invalid-format"):
        IntFormat(7)
    assert Dequantize.tag == "dequantize"
