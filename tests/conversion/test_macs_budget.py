"""Conversions to a budget of multiply-adds, which is kept by what PyTorch counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_helpers import images_of
from covering import slow_unless
from error_codes import raises
from micro import all_micros, schemes
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.workload import count_macs
from tiedconv.errors import BudgetError, NothingToConvert, RecipeError
from tiedconv.io.checkpoint_reader import read
from tiedconv.planning.budget import Budget
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.macs import unfused
from tiedconv.runtime.tie import state_of

SCHEMES = [name for name in schemes() if name != "shared"]  # which never takes fewer
PAIRS = list(itertools.product(all_micros(), SCHEMES))
FAST = {("timm-vit", "lowrank"), ("convmixer", "basis"), ("perceptron", "auto")}


def counted(name: str, model: nn.Module) -> int:
    """By PyTorch, of one example; the model applies factors from here on."""
    micro = all_micros()[name]
    apply_factors(model.requires_grad_(False), cache=True)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, unfused():
        micro.forward(model, micro.input()[:1])
    return counter.get_total_flops() // 2


def fewest(name: str, scheme: str) -> int | None:
    """The smallest number that a scheme says it can keep to; None if it converts nothing."""
    micro = all_micros()[name]
    try:
        tiedconv.convert(micro.model(), scheme, macs=101, example=micro.input()[:1])
    except BudgetError as error:
        return error.smallest if error.code == "macs-too-few" else None
    except NothingToConvert:
        return None
    raise AssertionError


@pytest.mark.parametrize(("name", "scheme"), slow_unless(PAIRS, FAST))
def test_a_budget_is_kept(name: str, scheme: str) -> None:
    micro = all_micros()[name]
    whole = count_macs(micro.model(), example=micro.input()[:1])
    assert whole is not None
    least = fewest(name, scheme)
    if least is None or least >= whole.total - 1:
        pytest.skip("it never takes fewer")
    budget = (least + whole.total) // 2
    model = tiedconv.convert(micro.model(), scheme, macs=budget, example=micro.input()[:1])
    expected, record = micro.logits(model), tiedconv.report(model).macs
    assert record is not None
    assert record["original"] == whole.total
    assert record["converted"] == counted(name, model) <= budget
    assert torch.allclose(micro.logits(model), expected, rtol=1e-3, atol=1e-4)


def test_a_scheme_that_takes_no_fewer_is_refused_and_others_are_named() -> None:
    micro = all_micros()["timm-vit"]
    with raises(BudgetError, "macs-too-few", 'scheme="lowrank" reaches', "when they are used"):
        tiedconv.convert(micro.model(), "shared", macs="60%")


def test_the_smallest_that_is_named_can_be_reached() -> None:
    least = fewest("timm-vit", "lowrank")
    assert least is not None
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lowrank", macs=least)
    assert counted("timm-vit", model) == least


class Choosy(nn.Module):
    """Takes sequences of 24 features in pairs alone, which nobody tries."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Both `(n, 24)`."""
        for layer in self.layers:
            x = layer(x) + y
        return x


def test_a_model_that_runs_on_nothing_needs_an_example() -> None:
    with raises(BudgetError, "macs-unknown"):
        tiedconv.convert(Choosy(), "lowrank", macs="60%")
    example = torch.zeros(1, 24), torch.zeros(1, 24)
    model = tiedconv.convert(Choosy(), "lowrank", macs="60%", example=example)
    assert tiedconv.report(model).macs == {
        "original": 3 * 24 * 24, "converted": 3 * 48 * 7, "inputs": [[1, 24], [1, 24]]
    }  # fmt: skip


@pytest.mark.parametrize(("text", "code"), [
    ("100%", "budget-saves-nothing"), ("60", "budget-without-percent"), ("few", "budget-invalid"),
])  # fmt: skip
def test_what_is_no_budget_is_refused(text: str, code: str) -> None:
    with raises(RecipeError, code, "macs="):
        tiedconv.convert(all_micros()["timm-vit"].model(), "lowrank", macs=text)


def test_recipes_have_the_budget(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('macs = "60%"\nparams = "70%"\n[[rule]]\nscheme = "lowrank"\n')
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe.of("lowrank", macs=0.6, params="70%")
    assert recipe.macs == Budget("60%", "macs")
    assert recipe.to_json()["macs"] == "60%"
    with raises(RecipeError, "rank-and-budget"):
        Recipe.of("lowrank", macs=0.6, rank=3)
    assert Budget("2.5G", "macs").resolve(10**10) == 2_500_000_000


@pytest.mark.parametrize(
    "scheme",
    ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lowrank", "basis"))],
)
def test_parameters_and_multiply_adds_are_both_kept(scheme: str) -> None:
    name = "torchvision-resnet" if scheme != "auto" else "perceptron"
    micro = all_micros()[name]
    example = micro.input()[:1]
    for params, macs in (("60%", "90%"), ("90%", "60%"), ("65%", "65%")):
        model = tiedconv.convert(micro.model(), scheme, params=params, macs=macs, example=example)
        report = tiedconv.report(model)
        assert report.macs is not None
        assert report.ratio <= float(params[:-1]) / 100
        assert report.macs["converted"] <= float(macs[:-1]) / 100 * report.macs["original"]
        assert report.macs["converted"] == counted(name, model)


class Lopsided(nn.Module):
    """Convolutions of few parameters and many positions, then layers of many parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList(nn.Conv2d(16, 16, 1) for _ in range(3))
        self.late = nn.ModuleList(nn.Linear(16, 16) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 16, h, w)` to `(n, 16)`."""
        for layer in self.early:
            x = torch.relu(layer(x))
        x = x.mean((2, 3))
        for layer in self.late:
            x = torch.relu(layer(x))
        return x


def test_each_budget_is_spent_where_it_says() -> None:
    example = torch.randn(1, 16, 8, 8)
    spent: dict[str, list[int]] = {}
    for budget in ("params", "macs"):
        torch.manual_seed(0)
        model = tiedconv.convert(Lopsided(), "auto", **{budget: "60%"}, example=example)
        groups = state_of(model).plan.groups
        spent[budget] = [
            sum(g.original - g.stored for g in groups if g.name.startswith(part))
            for part in ("early", "late")
        ]
    assert spent["params"][1] > spent["params"][0]
    assert spent["macs"][0] > 0.35 * 3 * 16 * 16
    assert spent["macs"][1] < spent["params"][1]


@pytest.mark.slow
def test_bytes_and_multiply_adds_are_both_kept(tmp_path: Path) -> None:
    micro, path = all_micros()["timm-vit"], tmp_path / "m.safetensors"
    data = TensorDataset(images_of("timm-vit", 16), torch.zeros(16, dtype=torch.int64))
    calib = Calibration(data, config=CalibConfig(effort="fast"), workers=0)
    model = tiedconv.convert(micro.model(), "auto", bytes="50%", macs="70%", calib=calib)
    original = 4 * sum(t.numel() for t in micro.model().state_dict().values())
    assert tiedconv.save(model, path) <= 0.5 * original
    record = read(path).history[0]["macs"]
    assert record["converted"] <= 0.7 * record["original"]
    assert record["inputs"] == [[1, 3, 16, 16]]
    loaded = tiedconv.load(path, model=micro.model())
    assert state_of(loaded).plan.codes
    assert counted("timm-vit", loaded) == record["converted"]


def test_a_single_scheme_is_rounded_within_both_budgets() -> None:
    micro = all_micros()["timm-vit"]
    model = tiedconv.convert(micro.model(), "lowrank", bytes="60%", bits=8, macs="50%")
    report = tiedconv.report(model)
    assert report.macs is not None
    assert counted("timm-vit", model) == report.macs["converted"] <= 0.5 * report.macs["original"]
    assert report.integers > 0


@pytest.mark.slow
def test_rules_share_a_budget() -> None:
    micro = all_micros()["timm-vit"]
    rules = (Rule("tied", include=("*attn*",)), Rule("lowrank", include=("*mlp*",)))
    recipe = Recipe(rules, macs=Budget("80%", "macs"))
    model = tiedconv.convert(micro.model(), recipe=recipe)
    schemes = {group.scheme for group in state_of(model).plan.groups}
    assert schemes == {"tied", "lowrank"}
    record = tiedconv.report(model).macs
    assert record is not None
    assert counted("timm-vit", model) == record["converted"] <= 0.8 * record["original"]


def test_the_history_is_plain_data() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lowrank", macs="60%")
    entry: dict[str, Any] = dict(state_of(model).history[0])
    assert json.loads(json.dumps(entry))["recipe"]["macs"] == "60%"
