"""Laws that hold for every scheme on every model of `micro`.

A new file in `schemes/` or `families/` is tried here without a new test: the fast tests take each
scheme on two models or more and each model once, the slow ones take the whole product.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering, slow_unless
from micro import MEANT_FOR, Micro, all_micros, original_logits, schemes, settle
from planning_helpers import make_plan
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tiedconv
from tiedconv.conversion.symmetry_proof import SymmetryProof
from tiedconv.core.plan import Plan
from tiedconv.core.units import is_depthwise
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.families import all_families, find_blocks
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.budget import Budget
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.flops import never_materialized
from tiedconv.runtime.tie import dense_state_dict, is_tied, state_of
from tiedconv.schemes import all_schemes, make_scheme
from tiedconv.schemes._base import Ranked

# Where a scheme truly finds nothing. A square stack has no pair of shapes (m, d) and (d, m); narrow
# needs one between whose matrices all is known.
UNKNOWN_BETWEEN = ("torchvision-resnext", "convmixer", "perceptron", "generators")
NOTHING = {
    ("perceptron", "tied"),
    *((name, "narrow") for name in UNKNOWN_BETWEEN),
    *((m, s) for s, (of, _) in MEANT_FOR.items() for m in all_micros() if m != of),
}
PLAIN = [(m, s) for m, s in itertools.product(all_micros(), all_schemes()) if (m, s) not in NOTHING]

# A scheme that chooses by size is given one: not all of these models can be halved.
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"params": "70%", "share": False},
    **{scheme: options for scheme, (_, options) in MEANT_FOR.items()},
}
# Schemes whose options make another form of them, each on one model of each kind.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "basis of two": ("basis", {"groups": "adjacent:2"}),
    "basis of a stack": ("basis", {"groups": "all"}),
    "basis, joined": ("basis", {"join": True}),
    "basis, tied": ("basis", {"tie": True}),
    "basis, all of these": ("basis", {"groups": "all", "join": True, "tie": True}),
    "lors, bases": ("lors", {"bases": 2, "rank": 0.1, "groups": "adjacent:3"}),
    "lors, core": ("lors", {"base_rank": 0.4}),
    "auto, sharing": ("auto", {"params": "70%"}),
    "narrow, by eights": ("narrow", {"width": 0.4, "step": 8}),
    "narrow, budget": ("narrow", {"params": "85%"}),
    "tied, core": ("tied", {"base_rank": 0.5}),
    "tied, core and rank": ("tied", {"base_rank": 0.4, "rank": 2}),
}
VARIED = ("timm-vit", "torchvision-resnet", "hf-imagegpt")
# Likewise, of schemes for one kind of layer.
MEANT_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lors-adaptive, terms": (
        "lors-adaptive", {"shape": [6, 4], "rank": 2, "k": [0, 1, 2], "include": ["*spatial*"]}
    ),
    "lors-adaptive, budget": (
        "lors-adaptive", {"shape": [8, 8], "params": "90%", "include": ["*channel*"]}
    ),
}  # fmt: skip
PAIRS = [
    *PLAIN,
    *((m, v) for m, v in itertools.product(VARIED, VARIANTS) if (m, VARIANTS[v][0]) not in NOTHING),
    *((MEANT_FOR[scheme][0], name) for name, (scheme, _) in MEANT_VARIANTS.items()),
]
VARIANTS |= MEANT_VARIANTS
FAST = covering(PLAIN, 1, 2) | covering([p for p in PAIRS if p not in PLAIN], 1, 1)
FAST -= {  # seconds for each law
    ("generators", "lors-adaptive, budget"),
    *((name, "auto") for name in ("torch-transformer", "timm-resnet", "torchvision-vit")),
}
FAST |= {("torch-transformer", "tied"), ("timm-resnet", "tied"), ("torchvision-vit", "lors")}
EXACT = 1e-5

each_pair = pytest.mark.parametrize(("name", "scheme"), slow_unless(PAIRS, FAST))
# Of laws that take longest, each scheme and each form of one on a single model.
FEW = covering([pair for pair in PAIRS if pair in FAST], 0, 1)
each_form = pytest.mark.parametrize(("name", "scheme"), slow_unless(PAIRS, FEW))
each_micro = pytest.mark.parametrize("name", all_micros())


def meaning(scheme: str) -> tuple[str, dict[str, Any]]:
    """The scheme and the options that a name here stands for."""
    return VARIANTS.get(scheme, (scheme, OPTIONS.get(scheme, {})))


def convert(model: nn.Module, scheme: str) -> nn.Module:
    """The tied model, whatever a name here stands for."""
    of, options = meaning(scheme)
    return tiedconv.convert(model, of, **options)


@functools.cache
def _converted(name: str, scheme: str) -> nn.Module:
    return convert(all_micros()[name].model(), scheme)


def converted(name: str, scheme: str) -> tuple[Micro, nn.Module]:
    """The tiny model and a tied one of one's own."""
    return all_micros()[name], copy.deepcopy(_converted(name, scheme))


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest entry."""
    return float((a - b).abs().max() / b.abs().max())


def stored(model: nn.Module) -> dict[str, nn.Parameter]:
    """The factors of a tied model."""
    return {n: p for n, p in model.named_parameters() if n in state_of(model).plan.factors}


def storages(tensors: Iterator[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every converted weight as the model's own modules give it."""
    for name in state_of(model).plan.weights:
        path, _, attribute = name.rpartition(".")
        yield name, getattr(model.get_submodule(path), attribute)


def assert_tied(model: nn.Module) -> None:
    """Every number is stored once, and every weight is what its expression says."""
    plan = state_of(model).plan
    parameters = list(model.parameters())
    assert sum(p.numel() for p in parameters) == plan.stored
    assert len(storages(iter(parameters))) == len(parameters)
    own = dict(model.named_parameters())
    for name, weight in weights_of(model):
        expr = plan.weights[name]
        assert torch.equal(weight, expr.evaluate(own.__getitem__)), name
        if expr.is_view:
            read = {own[ref].untyped_storage().data_ptr() for ref in expr.refs}
            assert weight.untyped_storage().data_ptr() in read, name


def test_every_family_has_a_tiny_model() -> None:
    found = set().union(*map(families_in, all_micros()))
    missing = {family.name for family in all_families()} - found
    assert not missing, f"No model of tests/micro.py matches {missing}: add one there"


@pytest.mark.parametrize(("name", "scheme"), sorted(NOTHING))
def test_what_finds_nothing_says_so(name: str, scheme: str) -> None:
    with pytest.raises(NothingToConvert):
        tiedconv.convert(all_micros()[name].model(), scheme)


@pytest.mark.parametrize("scheme", schemes())
def test_no_scheme_approximates_depthwise_kernels(scheme: str) -> None:
    """Their channels don't mix: a product of factors would; `narrow` removes whole channels."""
    blocks = [block for _, block in inspect_model(all_micros()["hybrid"].model()).blocks]
    assert any(is_depthwise(slot) for block in blocks for slot in block.slots.values())
    for candidate in make_scheme(scheme, {}).candidates():
        members = [m.slot for d in candidate.drafts(blocks) for m in d.members]
        assert candidate.name == "narrow" or not any(map(is_depthwise, members))


@each_micro
def test_the_model_answers_something_that_its_weights_decide(name: str) -> None:
    """Otherwise every law below would hold of nothing."""
    logits = original_logits(name)
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits[0], logits[1])
    _, tied = converted(name, "lowrank")
    assert relative(all_micros()[name].logits(tied), logits) > 1e-3


# One of each kind is tried with every option, the others with the default ones.
EVERY_OPTION = {"timm-vit", "torchvision-resnet", "hf-imagegpt", "torch-transformer", "aliased"}


def full_rank_cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, scheme in PLAIN:
        cls = all_schemes()[scheme]
        if issubclass(cls, Ranked):
            options: list[dict[str, Any]] = [{}]
            if name in EVERY_OPTION:
                options += map(dict, cls.smaller_options)
            if name in EVERY_OPTION and scheme == "tied":
                options += [{"scale": False}, {"pairing": "vo-qk"}, {"first": "slice"}]
                options += [{"base_rank": 10**6}]
            if name in EVERY_OPTION and scheme == "lors":
                options += [{"groups": "adjacent:2"}, {"fused": False}, {"match": False}]
                # Residuals make up for a base, but a layer without an equal has the base alone.
                alone = {b.unmatched for _, b in inspect_model(all_micros()[name].model()).blocks}
                options += [{"base_rank": 10**6 if alone != {False} else 3}]
                # Two bases for two layers would be no fewer numbers, so nothing is converted.
                options += [{"bases": 2}] if name != "torch-transformer" else []
            for option in options:
                option.pop("rank", None)
            for i, option in enumerate(options):
                if option not in options[:i]:
                    yield name, scheme, option


FULL_RANK = list(full_rank_cases())
FULL_FAST = covering([(name, f"{scheme} {sorted(of)}") for name, scheme, of in FULL_RANK], 2, 2)


@pytest.mark.parametrize(
    ("name", "scheme", "options"),
    slow_unless(FULL_RANK, [c for c in FULL_RANK if (c[0], f"{c[1]} {sorted(c[2])}") in FULL_FAST]),
)
def test_full_rank_reproduces_the_original(name: str, scheme: str, options: dict[str, Any]) -> None:
    micro = all_micros()[name]
    tied = tiedconv.convert(micro.model(), scheme, rank=10**6, **options)
    assert_tied(tied)
    assert relative(micro.logits(tied), original_logits(name)) < EXACT


FULL_WIDTH = [name for name, scheme in PLAIN if scheme == "narrow"]


@pytest.mark.parametrize("name", slow_unless(FULL_WIDTH, FULL_WIDTH[:2]))
def test_full_width_reproduces_the_original(name: str) -> None:
    micro = all_micros()[name]
    tied = tiedconv.convert(micro.model(), "narrow", width=10**6)
    assert_tied(tied)
    assert relative(micro.logits(tied), original_logits(name)) < EXACT


BASES: dict[str, dict[str, Any]] = {
    "each": {},
    "adjacent": {"groups": "adjacent:2"},
    "all": {"groups": "all"},
    "joined": {"join": True},
    "all joined": {"groups": "all", "join": True},
}
FULL_BASES = list(itertools.product(all_micros(), BASES))


@pytest.mark.parametrize(("name", "bases"), slow_unless(FULL_BASES, covering(FULL_BASES, 1, 1)))
def test_a_basis_of_full_rank_reproduces_the_original(name: str, bases: str) -> None:
    micro = all_micros()[name]
    tied = tiedconv.convert(micro.model(), "basis", base_rank=10**6, **BASES[bases])
    assert_tied(tied)
    assert relative(micro.logits(tied), original_logits(name)) < EXACT


@each_form
def test_the_plan_the_model_and_the_report_agree_on_what_is_stored(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    plan = state_of(tied).plan
    report = tiedconv.report(tied)
    of, options = meaning(scheme)
    dry = tiedconv.plan(micro.model(), of, **options)
    original = sum(p.numel() for p in micro.model().parameters())
    assert_tied(tied)
    assert plan.stored == report.stored
    assert plan.original == report.original == dry.original == original
    assert plan.stored < original
    if "params" not in options:  # without weights, a budget is spread evenly
        assert plan.stored == dry.stored
        assert dict(dry.weights) == dict(plan.weights)
    assert report.stored - report.kept == sum(g.stored for g in report.groups)
    assert report.original - report.kept == sum(g.original for g in report.groups)
    assert report.tensor_bytes == sum(
        t.numel() * t.element_size() for n, t in tied.state_dict().items() if n not in plan.aliases
    )
    assert all(g.error is not None and 0 <= g.error < 1.01 for g in report.groups)


def smallest_budget(model: nn.Module, scheme: str, options: dict[str, Any]) -> float:
    """The smallest of a few fractions of the model that a scheme can keep to."""
    for percent in range(30, 100, 10):
        try:
            tiedconv.plan(model, scheme, params=f"{percent}%", **options)
        except BudgetError:
            continue
        return percent / 100
    raise AssertionError(f"{scheme} keeps to no budget")


SCALED = [(*pair, scale) for scale in (1e-6, 3e4) for pair in PLAIN]


@pytest.mark.parametrize(
    ("name", "scheme", "scale"),
    # The least scale is where a budget has been missed.
    slow_unless(SCALED, [(*p, 1e-6) for p in FEW if p in PLAIN and p[1] not in MEANT_FOR]),
)
def test_a_budget_is_kept_at_any_scale_of_the_weights(name: str, scheme: str, scale: float) -> None:
    options = {k: v for k, v in meaning(scheme)[1].items() if k != "params"}
    model = all_micros()[name].model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    fraction = smallest_budget(model, scheme, options)
    tied = tiedconv.convert(model, scheme, params=f"{fraction:.0%}", **options)
    report = tiedconv.report(tied)
    assert report.stored <= fraction * report.original
    assert_tied(tied)


@each_form
def test_the_reported_error_is_that_of_the_weights(name: str, scheme: str) -> None:
    """Against the same weights, moved by the same align, measured in another way."""
    micro, tied = converted(name, scheme)
    model = micro.model()
    info = inspect_model(model)
    own = model.state_dict()
    # The recipe that was carried out: with a budget, the best of several.
    entry = state_of(tied).history[-1]["recipe"]
    rules = tuple(
        Rule(r.pop("scheme"), r, tuple(r.pop("include")), tuple(r.pop("exclude")))
        for r in copy.deepcopy(entry["rules"])
    )
    recipe = Recipe(rules, Budget(entry["params"]) if entry["params"] else None)
    allows = SymmetryProof(info, model)
    _, moved = make_plan(info, recipe, {n: own[n] for n in info.shapes}, allows=allows)
    now = {n: w.detach() for n, w in weights_of(tied)}
    for group in state_of(tied).plan.groups:
        wanted = torch.cat(
            [m.slot.matrix_of(moved[m.slot.tensor]).flatten() for m in group.members]
        )
        got = torch.cat([m.slot.matrix_of(now[m.slot.tensor]).flatten() for m in group.members])
        assert group.error == pytest.approx(float((got - wanted).norm() / wanted.norm()), abs=1e-5)


@each_pair
def test_a_deep_copy_is_tied_and_independent(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    other = copy.deepcopy(tied)
    before = micro.logits(tied)
    assert torch.equal(micro.logits(other), before)
    assert storages(other.parameters()).isdisjoint(storages(tied.parameters()))
    with torch.no_grad():
        for factor in stored(other).values():
            factor.mul_(1.5).add_(0.01)
    assert_tied(other)
    assert_tied(tied)
    assert torch.equal(micro.logits(tied), before)
    assert not torch.equal(micro.logits(other), before)
    # To untie the copy leaves the first one whole.
    tiedconv.untie(other)
    assert torch.equal(micro.logits(tied), before)


@each_form
def test_pickling_keeps_outputs_and_ties(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    if pickles(micro.model()):
        again = pickle.loads(pickle.dumps(tied))
        assert_tied(again)
        assert type(again) is type(tied)
        assert torch.equal(micro.logits(again), micro.logits(tied))


def pickles(model: nn.Module) -> bool:
    """Whether the untied model can be pickled at all."""
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


@each_pair
def test_casting_to_bfloat16_and_double_keeps_ties(name: str, scheme: str) -> None:
    _, tied = converted(name, scheme)
    for dtype in (torch.bfloat16, torch.float64):
        tied = tied.to(dtype)
        assert {p.dtype for p in tied.parameters()} == {dtype}
        assert {w.dtype for _, w in weights_of(tied)} == {dtype}
        assert_tied(tied)


@each_form
def test_load_state_dict_keeps_ties_and_gives_the_loaded_values(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    donor = copy.deepcopy(tied)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.mul_(0.9).add_(0.02)
    wanted = micro.logits(donor)
    for assign in (False, True):
        receiver = copy.deepcopy(tied)
        result = receiver.load_state_dict(copy.deepcopy(donor.state_dict()), assign=assign)
        assert not result.missing_keys
        assert not result.unexpected_keys
        assert torch.equal(micro.logits(receiver), wanted)
        if assign and state_of(tied).plan.aliases:
            # torch makes two parameters of one that the original itself shares; ours stay one.
            assert len(storages(iter(stored(receiver).values()))) == len(stored(receiver))
        else:
            assert_tied(receiver)


def factors_reached(plan: Plan, dense: nn.Module) -> set[str]:
    """Factors of the weights that have a gradient in the dense model.

    The loss of a detector's outputs reaches no weight that only chooses its queries.
    """
    reached = {w for w in plan.weights if dense.get_parameter(w).grad is not None}
    assert len(plan.weights) - len(reached) <= 1
    return {name for w in reached for name in plan.weights[w].refs}


@each_form
def test_a_training_step_reaches_every_stored_tensor_and_keeps_ties(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    before = micro.logits(tied)
    optimiser = torch.optim.SGD(tied.parameters(), lr=0.05)
    dense = tiedconv.untie(copy.deepcopy(tied))
    for model in (dense, tied):
        micro.forward(model, micro.input()).square().sum().backward()
    reached = factors_reached(state_of(tied).plan, dense)
    for key, factor in stored(tied).items():
        assert (factor.grad is not None) == (key in reached), key
        if factor.grad is None:
            continue
        assert factor.grad.shape == factor.shape
        assert torch.isfinite(factor.grad).all()
        assert bool(factor.grad.any()), key
    optimiser.step()
    assert_tied(tied)
    assert not torch.equal(micro.logits(tied), before)


@each_form
def test_gradients_are_those_of_the_dense_model_summed_over_each_use(
    name: str, scheme: str
) -> None:
    """The chain rule through the expressions, against the untied model's own gradients."""
    micro, tied = converted(name, scheme)
    tied = tied.double()
    dense = tiedconv.untie(copy.deepcopy(tied), narrow=False)
    micro.forward(tied, micro.input(torch.float64)).square().sum().backward()
    micro.forward(dense, micro.input(torch.float64)).square().sum().backward()
    factors = {n: p.detach().clone().requires_grad_() for n, p in stored(tied).items()}
    total = torch.zeros((), dtype=torch.float64)
    for weight, expr in state_of(tied).plan.weights.items():
        gradient = dense.get_parameter(weight).grad
        if gradient is not None:
            total = total + (expr.evaluate(factors.__getitem__) * gradient).sum()
    total.backward()
    for key in factors_reached(state_of(tied).plan, dense):
        expected, factor = factors[key].grad, stored(tied)[key]
        assert factor.grad is not None
        assert expected is not None
        assert torch.allclose(factor.grad, expected, rtol=1e-7, atol=1e-9), key


@each_pair
def test_an_average_of_weights_takes_each_stored_tensor_once(name: str, scheme: str) -> None:
    _, tied = converted(name, scheme)
    average = AveragedModel(tied, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(tied)
    before = {n: p.detach().clone() for n, p in tied.named_parameters()}
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter.add_(1.0)
    average.update_parameters(tied)
    assert_tied(average.module)
    for key, parameter in average.module.named_parameters():
        assert torch.allclose(parameter, before[key] + 0.5, atol=1e-6), key


@each_pair
def test_the_state_dict_holds_each_number_once(name: str, scheme: str) -> None:
    _, tied = converted(name, scheme)
    plan = state_of(tied).plan
    state = {n: t for n, t in tied.state_dict().items() if n not in plan.aliases}
    assert set(state) == {*plan.kept, *plan.factors}
    assert len(storages(iter(state.values()))) == len(state)
    assert not any(n in state for n in plan.weights)


@each_pair
def test_freezing_changes_no_output_and_training_or_loading_unfreezes(
    name: str, scheme: str
) -> None:
    micro, tied = converted(name, scheme)
    before = micro.logits(tied)
    keys = list(tied.state_dict())
    plan = state_of(tied).plan
    tiedconv.freeze(tied)
    assert relative(micro.logits(tied), before) < 1e-6
    assert list(tied.state_dict()) == keys
    cached = dict(weights_of(tied))
    computed = [n for n, e in plan.weights.items() if not (e.is_view or never_materialized(e))]
    again = dict(weights_of(tied))
    assert all(cached[n].data_ptr() == again[n].data_ptr() for n in computed)
    other = copy.deepcopy(tied)
    assert torch.equal(micro.logits(other), micro.logits(tied))

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for factor in stored(model).values():
                factor.mul_(1.25)

    tied.train()
    change(tied)
    assert_tied(tied)
    other.load_state_dict({n: t * 1.25 if t.is_floating_point() else t
                           for n, t in other.state_dict().items()})  # fmt: skip
    assert_tied(other)
    tiedconv.freeze(other)
    tiedconv.unfreeze(other)
    change(other)
    assert_tied(other)


def rounding(tied: nn.Module) -> float:
    """How far a tied model may be from the one with its weights: made, they are the same bits."""
    plan = state_of(tied).plan
    return 1e-5 if any(map(never_materialized, plan.weights.values())) else 1e-6


def classes(model: nn.Module) -> list[tuple[str, type[nn.Module]]]:
    return [(name, type(module)) for name, module in model.named_modules()]


@each_form
def test_untying_gives_classes_names_and_outputs_back(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    plain = micro.model()
    assert [n for n, _ in classes(tied)] == [n for n, _ in classes(plain)]
    assert all(isinstance(m, c) for m, (_, c) in zip(tied.modules(), classes(plain), strict=True))
    before = micro.logits(tied)
    off = rounding(tied)
    untied = tiedconv.untie(tied)
    assert untied is tied
    assert not is_tied(untied)
    assert classes(untied) == classes(plain)
    assert set(untied.state_dict()) == set(plain.state_dict())
    assert [n for n, _ in sorted(untied.named_parameters())] == [
        n for n, _ in sorted(plain.named_parameters())
    ]
    assert inspect_model(untied).aliases.keys() == inspect_model(plain).aliases.keys()
    assert relative(micro.logits(untied), before) < off
    # And what was untied can be tied again; layers may be as narrow as the step already.
    of, options = meaning(scheme)
    again = {**options, "step": 1} if of == "narrow" else options
    assert_tied(tiedconv.convert(untied, of, **again))


@each_pair
def test_the_dense_state_dict_fits_the_untouched_class(name: str, scheme: str) -> None:
    micro, tied = converted(name, scheme)
    dense = dense_state_dict(tied)
    plain = micro.model()
    assert set(dense) == set(plain.state_dict())
    plain.load_state_dict(dense, strict=True)
    assert relative(micro.logits(plain), micro.logits(tied)) < rounding(tied)


def header_length(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def unique_bytes(model: nn.Module) -> int:
    """Bytes of a model's stored tensors, each storage once."""
    sizes = {
        t.untyped_storage().data_ptr(): t.numel() * t.element_size()
        for t in model.state_dict().values()
    }
    return sum(sizes.values())


@each_form
def test_the_file_is_small_exact_and_the_same_each_time(
    name: str, scheme: str, tmp_path: Path
) -> None:
    micro, tied = converted(name, scheme)
    path, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    size = tiedconv.save(tied, path)
    assert size == path.stat().st_size
    assert size <= 1.01 * unique_bytes(tied) + header_length(path)
    skeleton = settle(all_micros()[name].build())
    loaded = tiedconv.load(path, model=skeleton)
    assert loaded is skeleton
    assert_tied(loaded)
    assert torch.equal(micro.logits(loaded), micro.logits(tied))
    assert classes(tiedconv.untie(copy.deepcopy(loaded))) == classes(micro.model())
    report = tiedconv.report(path)
    assert report.stored == state_of(tied).plan.stored
    assert report.file_bytes == size
    assert report.tensor_bytes == unique_bytes(tied)
    # The same model saved twice, and the same conversion done twice, give the same bytes.
    tiedconv.save(loaded, second)
    assert second.read_bytes() == path.read_bytes()
    tiedconv.save(convert(micro.model(), scheme), second, force=True)
    assert second.read_bytes() == path.read_bytes()


IN_A_NEW_PROCESS = """
import sys, torch, tiedconv
torch.set_num_threads(int(sys.argv[4]))
model = tiedconv.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    y = model(x)
torch.save(getattr(y, "logits", y), sys.argv[3])
"""

TIMM = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "num_classes": 5}


def run_python(*arguments: str | Path) -> str:
    """A new interpreter that finds this tiedconv."""
    root = Path(tiedconv.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("library", "scheme"),
    [pytest.param(*case, marks=pytest.mark.slow) for case in [("timm", "lors"), ("hf", "tied")]],
)
def test_a_new_process_gives_the_same_bits(library: str, scheme: str, tmp_path: Path) -> None:
    if library == "timm":
        tied = tiedconv.convert(
            "timm:vit_tiny_patch16_224", scheme, weights="none", model_args=TIMM, seed=7
        )
    else:
        folder = tmp_path / "model"
        folder.mkdir()
        config = all_micros()["hf-resnet"].model().config
        (folder / "config.json").write_text(
            json.dumps({**config.to_dict(), "architectures": ["ResNetForImageClassification"]})
        )
        tied = tiedconv.convert(f"hf:{folder}", scheme, weights="none", seed=7)
    path, given, answer = tmp_path / "m.safetensors", tmp_path / "x.pt", tmp_path / "y.pt"
    tiedconv.save(tied, path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.save(x, given)
    threads = str(torch.get_num_threads())
    run_python("-c", IN_A_NEW_PROCESS, path, given, answer, threads)
    with torch.no_grad():
        here = tied(x)
    assert torch.equal(torch.load(answer, weights_only=True), getattr(here, "logits", here))


@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_seed_gives_the_same_file_and_another_seed_another(
    seed: int, tmp_path: Path
) -> None:
    def make(seed: int, path: Path) -> bytes:
        model = tiedconv.convert(
            "timm:vit_tiny_patch16_224", "tied", weights="none", model_args=TIMM, seed=seed
        )
        tiedconv.save(model, path)
        return path.read_bytes()

    first = make(seed, tmp_path / "a.safetensors")
    torch.manual_seed(1234)
    assert make(seed, tmp_path / "b.safetensors") == first
    assert make(seed + 1, tmp_path / "c.safetensors") != first


@functools.cache
def example_of(family: str) -> str:
    """The first tiny model in which a family finds something."""
    return next(name for name in all_micros() if family in families_in(name))


@functools.cache
def families_in(name: str) -> frozenset[str]:
    """The families that find something in a tiny model."""
    info = inspect_model(all_micros()[name].model())
    return frozenset(family for family, _ in find_blocks(info.shapes, info.hints))


def compiled(micro: Micro, model: nn.Module, *, fullgraph: bool) -> Tensor:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own deprecations are not ours

        def forward(x: Tensor) -> Tensor:
            return micro.forward(model, x)

        with torch.no_grad():
            return torch.compile(forward, fullgraph=fullgraph, backend="eager")(micro.input())


@functools.cache
def compiles_whole(name: str) -> bool:
    """Whether the untied model can be compiled into one graph."""
    if all_micros()[name].library != "transformers":
        return True
    try:
        compiled(all_micros()[name], all_micros()[name].model(), fullgraph=True)
    except Exception:
        return False
    return True


COMPILED = list(itertools.product([family.name for family in all_families()], ["tied", "lors"]))
COMPILED_FAST = [("timm-vit", "lors")]


@pytest.mark.parametrize(("family", "scheme"), slow_unless(COMPILED, COMPILED_FAST))
def test_compiling_gives_the_same_outputs_in_as_few_graphs_as_before(
    family: str, scheme: str
) -> None:
    name = example_of(family)
    micro, tied = converted(name, scheme)
    answer = compiled(micro, tied, fullgraph=compiles_whole(name))
    assert relative(answer, micro.logits(tied)) < EXACT


def test_exporting_a_tied_model_keeps_each_number_once() -> None:
    micro, tied = converted("timm-vit", "lors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(tied, (micro.input(),))
    assert sum(p.numel() for p in program.parameters()) == state_of(tied).plan.stored
    assert relative(program.module()(micro.input()).detach(), micro.logits(tied)) < EXACT


@each_form
def test_weights_that_did_not_train_still_do_not(name: str, scheme: str) -> None:
    micro = all_micros()[name]
    model = micro.model().requires_grad_(False)
    tied = convert(model, scheme)
    assert not any(p.requires_grad for p in tied.parameters())
    assert not any(p.requires_grad for p in tiedconv.untie(tied).parameters())


@pytest.mark.parametrize("scheme", slow_unless(schemes(), [s for s in schemes() if s != "auto"]))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_fitted_and_stay_half(scheme: str, dtype: torch.dtype) -> None:
    for name in ("timm-vit", "torchvision-resnet"):
        micro = all_micros()[name]
        ranked = issubclass(all_schemes()[scheme], Ranked)
        options: dict[str, Any] = {"rank": 10**6} if ranked else OPTIONS.get(scheme, {})
        tied = tiedconv.convert(micro.model(dtype), scheme, **options)
        assert {p.dtype for p in tied.parameters()} == {dtype}
        assert_tied(tied)
        if ranked:
            assert relative(micro.logits(tied).float(), original_logits(name)) < 0.1


def test_two_rules_in_one_recipe_keep_the_laws() -> None:
    micro = all_micros()["timm-vit"]
    recipe = Recipe(
        (
            Rule("tied", {"rank": 10**6}, include=("*mlp*",)),
            Rule("lors", {"rank": 10**6}, include=("*attn*",)),
        )
    )
    tied = tiedconv.convert(micro.model(), recipe=recipe)
    assert {g.scheme for g in state_of(tied).plan.groups} == {"tied", "lors"}
    assert_tied(tied)
    assert relative(micro.logits(tied), original_logits("timm-vit")) < EXACT


def test_hooks_and_methods_of_the_class_survive() -> None:
    micro = all_micros()["timm-vit"]
    model = micro.model()
    calls: list[str] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append("hook"))
    tied = tiedconv.convert(model, "tied", inplace=True)
    calls.clear()  # hooks are a part of the function, so proofs of symmetries call them as well
    micro.logits(tied)
    assert calls == ["hook"]
    assert tied.forward_features(micro.input()).shape[-1] == 32
    assert "Linear(in_features=32" in repr(tied.blocks[0].mlp.fc1)


def test_saved_tensors_are_readable_without_tiedconv(tmp_path: Path) -> None:
    _, tied = converted("timm-vit", "tied")
    tiedconv.save(tied, tmp_path / "m.safetensors")
    plain = load_file(tmp_path / "m.safetensors")
    assert {n: tuple(t.shape) for n, t in plain.items()} == {
        n: tuple(t.shape) for n, t in tied.state_dict().items()
    }


def test_a_dense_file_from_export_loads_where_the_original_did(tmp_path: Path) -> None:
    args = {"model_args": TIMM, "weights": "none"}
    tied = tiedconv.convert("timm:vit_tiny_patch16_224", "tied", **args)
    tiedconv.save(tied, tmp_path / "m.safetensors")
    for ending, read in DENSE_READERS.items():
        tiedconv.export(tmp_path / "m.safetensors", tmp_path / f"dense{ending}")
        state = read(tmp_path / f"dense{ending}")
        plain = tiedconv.untie(tiedconv.load(tmp_path / "m.safetensors"))
        for parameter in plain.parameters():
            parameter.data.zero_()
        plain.load_state_dict(OrderedDict(state), strict=True)
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            assert relative(plain(x), tied(x)) < 1e-6


DENSE_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": load_file,
    ".pth": lambda path: torch.load(path, weights_only=True),
}
