"""Scheme narrow: which units stay, what is stored, what it costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from error_codes import raises
from micro import all_micros
from planning_helpers import fit_plan, make_plan
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv import CalibConfig, Calibration
from tiedconv.calibration import gather_statistics
from tiedconv.conversion.symmetry_proof import SymmetryProof
from tiedconv.core.pad import has_pads
from tiedconv.core.units import units_among
from tiedconv.errors import NothingToConvert, SchemeError
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.tie import state_of


def images(name: str = "timm-vit", count: int = 24) -> Tensor:
    shape = all_micros()[name].input().shape[1:]
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))


def data(name: str = "timm-vit") -> TensorDataset:
    return TensorDataset(images(name), torch.zeros(24, dtype=torch.int64))


def calibrated(name: str, scheme: str = "narrow", **options: Any) -> nn.Module:
    how = Calibration(data(name), images=24, config=CalibConfig(effort="fast"), workers=0)
    return tiedconv.convert(all_micros()[name].model(), scheme, calib=how, **options)


FEED_FORWARDS = {"include": ["*mlp*", "*linear*"]}


def widths(model: nn.Module) -> list[tuple[int, ...]]:
    groups = [g for g in state_of(model).plan.groups if g.scheme == "narrow"]
    return [tuple(shape[0] for shape in list(g.factors.values())[:-1]) for g in groups]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, (32,)),
        ({"width": 0.3}, (16,)),
        ({"width": 0.3, "step": 1}, (19,)),
        ({"width": 20}, (24,)),
        ({"width": 1, "step": 1}, (1,)),
        ({"width": 1000}, (64,)),
        ({"width": [16]}, (16,)),
    ],
)
def test_the_width_is_a_number_or_a_fraction_in_steps(
    options: dict[str, Any], wanted: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64)
                                                   for _ in range(2))})  # fmt: skip
    plan = tiedconv.plan(model, "narrow", **options, **FEED_FORWARDS)
    assert {tuple(s[0] for s in list(g.factors.values())[:-1]) for g in plan.groups} == {wanted}


@pytest.mark.parametrize("options", [{"width": 0}, {"width": -1}, {"width": 1.5}, {"step": 0}])
def test_an_impossible_width_is_refused(options: dict[str, Any]) -> None:
    with raises(SchemeError, "invalid-width"):
        tiedconv.plan(all_micros()["timm-vit"].model(), "narrow", **options)


def test_a_list_of_widths_has_one_for_each_hidden_layer() -> None:
    with raises(SchemeError, "wrong-rank-count"):
        tiedconv.plan(all_micros()["timm-vit"].model(), "narrow", width=[8, 8])


def test_without_images_the_units_with_the_largest_weights_stay() -> None:
    micro = all_micros()["timm-vit"]
    model = micro.model()
    with torch.no_grad():
        for weight in (model.blocks[0].mlp.fc1.weight[5], model.blocks[0].mlp.fc2.weight[:, 9]):
            weight.mul_(100)
    tied = tiedconv.convert(copy.deepcopy(model), "narrow", width=2, step=1)
    kept = tied.blocks[0].mlp.fc1.weight[:2]
    assert {*map(tuple, kept.tolist())} == {
        tuple(model.blocks[0].mlp.fc1.weight[i].tolist()) for i in (5, 9)
    }


def with_repeated_units(model: nn.Module) -> nn.Module:
    """A ViT half of whose hidden units are made copies of the other half."""
    blocks: Any = model.blocks
    with torch.no_grad():
        for block in blocks:
            half = block.mlp.fc1.out_features // 2
            block.mlp.fc1.weight[half:] = block.mlp.fc1.weight[:half]
            block.mlp.fc1.bias[half:] = block.mlp.fc1.bias[:half]
    return model


def test_a_unit_that_others_repeat_costs_nothing_to_remove() -> None:
    """Half of the hidden units are copies of the other half: outputs stay."""
    micro = all_micros()["timm-vit"]
    model = with_repeated_units(micro.model())
    how = Calibration(data(), images=24, config=CalibConfig(effort="fast"), workers=0)
    options: dict[str, Any] = {"width": 0.5, **FEED_FORWARDS}
    tied = tiedconv.convert(copy.deepcopy(model), "narrow", calib=how, **options)
    x = images(count=4)
    with torch.no_grad():
        wanted, found = model.eval()(x), tied.eval()(x)
    # The ridge of the statistics keeps the fit from being exact.
    plain = tiedconv.convert(copy.deepcopy(model), "narrow", **options).eval()
    with torch.no_grad():
        lost = (plain(x) - wanted).norm()
    assert (found - wanted).norm() < 0.2 * lost


@pytest.mark.slow
def test_images_choose_and_fit_better_than_the_weights_alone() -> None:
    for name in ("timm-vit", "torchvision-resnet"):
        model = all_micros()[name].model().eval()
        x = images(name, 8)
        with torch.no_grad():
            wanted = model(x)
            off = [
                float((m.eval()(x) - wanted).norm())
                for m in (calibrated(name), tiedconv.convert(copy.deepcopy(model), "narrow"))
            ]
        assert off[0] < off[1], name


def test_the_cost_is_that_of_the_fitted_matrix_alone_and_least_squares_lower_nothing() -> None:
    """Rows that nothing reads cost nothing; the closed form is the minimum."""
    model = all_micros()["timm-vit"].model()
    info = inspect_model(model)
    recipe = Recipe((Rule("narrow", {"width": 0.4}, ("*mlp*",)),))
    own = {n: model.state_dict()[n] for n in info.shapes}
    found: dict[str, Any] = {}

    def measure(aligned: Any) -> Any:
        weights = {n: False for n in info.shapes if n.endswith("weight") and "mlp" in n}
        found["metrics"] = gather_statistics(model, weights, data(), workers=0).metrics
        return found["metrics"]

    plan, moved = make_plan(info, recipe, own, allows=SymmetryProof(info, model), measure=measure)
    # `moved` has the units in their order; so must the metrics.
    metrics = gather_statistics(
        _with(model, moved), dict.fromkeys(found["metrics"], False), data(), workers=0
    ).metrics
    fitted, factors, cost = fit_plan(plan, moved, metrics=metrics)
    expected = 0.0
    for group in fitted.groups:
        up, down = group.members
        metric = metrics[down.slot.tensor]
        kept = group.factors["W0"][0]
        error = moved[down.slot.tensor].clone()
        stored = factors[group.stored_name("W1")]
        error[:, :kept] -= stored
        expected += metric.cost(error)
        best = metric.onto_first_columns(moved[down.slot.tensor], kept)
        assert torch.allclose(stored, best, atol=1e-4)
        assert torch.equal(factors[group.stored_name("W0")], moved[up.slot.tensor][:kept])
    assert cost == pytest.approx(expected, rel=1e-3)


def _with(model: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict(tensors, strict=False)
    return other


@pytest.mark.parametrize(
    "name", ["timm-vit", pytest.param("torchvision-resnet", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("step", [1, 8])
def test_a_budget_is_kept_and_used(name: str, step: int) -> None:
    tied = calibrated(name, params="80%", step=step)
    report = tiedconv.report(tied)
    assert report.stored <= 0.8 * report.original
    smallest = 64 * step if name == "timm-vit" else 600 * step
    assert report.stored > 0.8 * report.original - max(smallest, 0.006 * report.original)
    assert len({w for group in widths(tied) for w in group}) > 1


@pytest.mark.slow
def test_auto_takes_it_where_units_repeat() -> None:
    model = with_repeated_units(all_micros()["timm-vit"].model())
    how = Calibration(data(), images=24, config=CalibConfig(effort="fast"), workers=0)
    tied = tiedconv.convert(model, "auto", params="70%", share=False, calib=how)
    schemes = {g.scheme for g in state_of(tied).plan.groups if ".mlp" in g.name}
    assert "narrow" in schemes


def test_integers_are_of_the_narrow_tensors() -> None:
    tied = calibrated("timm-vit", params="80%", bytes="30%")
    plan = state_of(tied).plan
    assert plan.codes
    assert has_pads(plan.weights.values())
    micro = all_micros()["timm-vit"]
    before = micro.logits(tied)
    found = tiedconv.narrow_layers(tied)
    assert found.narrow
    assert not found.left
    assert torch.allclose(micro.logits(tied), before, atol=1e-5)


def test_training_keeps_removed_units_at_zero() -> None:
    tied = calibrated("timm-vit")
    (kept,) = {rows for (rows,) in map(set, widths(tied)) if rows > 16}
    optimiser = torch.optim.SGD(tied.parameters(), lr=0.1)
    for _ in range(2):
        tied(images(count=4)).square().sum().backward()
        optimiser.step()
    mlp = tied.blocks[0].mlp
    assert not mlp.fc1.weight[kept:].any()
    assert not mlp.fc2.weight[:, kept:].any()
    assert mlp.fc1.weight[:kept].any()


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("timm-vit", {"q-k-v-o": (16,), "up-down": (64,)}),
        ("torchvision-resnet", {"conv1-conv2-conv3": (16, 16)}),
        (
            "hybrid",
            {
                "q-k-v-o": (8,),
                "gate-up-down": (16,),
                "up-depthwise-reduce-expand-down": (16, 8),
            },
        ),
    ],
)
def test_each_kind_of_block_loses_the_units_that_it_has(
    name: str, roles: dict[str, tuple[int, ...]]
) -> None:
    plan = tiedconv.plan(all_micros()[name].model(), "narrow")
    found = {}
    for group in plan.groups:
        if group.scheme != "narrow":
            continue
        of = str(group.options["roles"])
        units = units_among(of.split("-"))
        rows = [shape[0] for shape in group.factors.values()]
        assert all(len({rows[i] for i in u.writers}) == 1 for u in units)
        found[of] = tuple(rows[u.writers[0]] for u in units)
    assert found == roles


def test_heads_that_others_repeat_are_the_first_to_go() -> None:
    """Of three heads two are copies with the same values: one of these costs nothing to remove."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(16, 8, num_classes=7, embed_dim=48, depth=1, num_heads=3)
    attention: Any = model.blocks[0].attn
    with torch.no_grad():
        for start in (0, 48, 96):
            rows = attention.qkv.weight[start : start + 48]
            rows[32:] = rows[16:32]
            attention.qkv.bias[start + 32 : start + 48] = attention.qkv.bias[
                start + 16 : start + 32
            ]
    how = Calibration(data(), images=24, config=CalibConfig(effort="fast"), workers=0)
    options: dict[str, Any] = {"width": 0.67, "include": ["*attn*"]}
    tied = tiedconv.convert(copy.deepcopy(model), "narrow", calib=how, **options)
    assert widths(tied) == [(32, 32, 32)]
    kept = tied.blocks[0].attn.qkv.weight[:32].reshape(2, 16, 48)
    assert not torch.allclose(kept[0], kept[1], atol=1e-3)
    x = images(count=4)
    plain = tiedconv.convert(copy.deepcopy(model), "narrow", **options).eval()
    with torch.no_grad():
        wanted, found, lost = (m.eval()(x) for m in (model, tied, plain))
    assert (found - wanted).norm() < 0.5 * (lost - wanted).norm()


def test_a_gate_that_is_left_out_leaves_its_units_whole() -> None:
    """A recipe without one of a unit's matrices can't remove it."""
    include = ["decoders*down_proj*", "decoders*up_proj*"]
    with raises(NothingToConvert, "nothing-to-convert"):
        tiedconv.plan(all_micros()["hybrid"].model(), "narrow", include=include)


def test_depthwise_kernels_get_the_most_bits() -> None:
    tied = calibrated("hybrid", bytes="30%")
    codes = state_of(tied).plan.codes
    groups = [g for g in state_of(tied).plan.groups if "depthwise" in g.name]
    assert groups
    for group in groups:
        kernel = f"{group.stored_name('W1')}/codes"
        assert codes[kernel].bits == 8
        assert codes[kernel].shape == (16, 9)
