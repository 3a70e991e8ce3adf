"""From a wish to a plan: what is taken, what is refused, and how a budget is spent."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering, slow_unless
from error_codes import raises
from micro import MEANT_FOR, all_micros, original_logits, schemes
from torch import nn

import tiedconv
from tiedconv.core.plan import Plan
from tiedconv.errors import (
    BudgetError,
    NothingToConvert,
    RecipeError,
    SchemeError,
    TiedconvError,
    UserError,
)
from tiedconv.families.inspect import inspect_model
from tiedconv.numerics.linalg import spectrum
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.budget import Budget
from tiedconv.planning.drafting import draft
from tiedconv.planning.feasibility import smaller_options
from tiedconv.planning.rank_allocation import allocate
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.planning.resources import limits
from tiedconv.runtime.tie import is_tied, state_of
from tiedconv.schemes import Draft, all_schemes, make_scheme
from tiedconv.schemes._base import Ranked
from tiedconv.wording import on_command_line

RANKED = [name for name, cls in all_schemes().items() if issubclass(cls, Ranked)]
# A scheme that chooses by size is given one: not all of these models can be halved.
OPTIONS: dict[str, dict[str, Any]] = {
    "auto": {"params": "90%"},
    **{scheme: options for scheme, (_, options) in MEANT_FOR.items()},
}


def model(name: str) -> nn.Module:
    return all_micros()[name].model()


@pytest.mark.parametrize("scheme", all_schemes())
def test_a_model_without_matrices_has_nothing_to_convert(scheme: str) -> None:
    with raises(NothingToConvert, "nothing-to-convert") as caught:
        tiedconv.convert(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)), scheme)
    assert caught.value.exit_code == 2


def test_a_scheme_that_finds_nothing_names_one_that_converts_most() -> None:
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 40))
    with raises(NothingToConvert, "nothing-to-convert", "generic linear") as caught:
        tiedconv.plan(dense, "tied")
    ways = re.findall(r'scheme="(\S+)" \(converts (\d+) %\)', str(caught.value))
    assert {"lowrank", "lors", "auto"} <= {way for way, _ in ways}
    for scheme, share in ways:
        plan = tiedconv.plan(dense, scheme)
        converted = sum(group.original for group in plan.groups)
        assert scheme == "auto" or round(100 * converted / plan.original) == int(share)


def test_an_include_that_takes_nothing_is_reported() -> None:
    with raises(NothingToConvert, "nothing-to-convert"):
        tiedconv.plan(model("timm-vit"), include=["nowhere*"])


@pytest.mark.parametrize(
    ("include", "exclude"),
    [(["*attn*"], []), (["*mlp*"], []), ([], ["*attn*"]), (["blocks.[01].*"], ["*mlp*"]), ([], [])],
)
@pytest.mark.parametrize("scheme", schemes())
def test_include_and_exclude_decide_which_tensors_change(
    scheme: str, include: list[str], exclude: list[str]
) -> None:
    options = OPTIONS.get(scheme, {})
    everything = tiedconv.plan(model("timm-vit"), scheme, **options)
    rule = Rule(scheme, {}, tuple(include) or ("*",), tuple(exclude))
    wanted = {n for n in everything.weights if rule.takes(n)}
    if not wanted:  # a scheme for feed-forwards alone
        with raises(NothingToConvert, "nothing-to-convert"):
            tiedconv.plan(model("timm-vit"), scheme, include=include, exclude=exclude, **options)
        return
    plan = tiedconv.plan(model("timm-vit"), scheme, include=include, exclude=exclude, **options)
    assert set(plan.weights) == wanted


def test_the_first_rule_that_takes_a_tensor_has_it() -> None:
    recipe = Recipe((Rule("lowrank", {"rank": 3}, ("*attn*",)), Rule("lors", {"rank": 2})))
    plan = tiedconv.plan(model("timm-vit"), recipe=recipe)
    by_scheme = {
        scheme: {m.slot.tensor for g in plan.groups if g.scheme == scheme for m in g.members}
        for scheme in ("lowrank", "lors")
    }
    assert all("attn" in n for n in by_scheme["lowrank"])
    assert all("mlp" in n for n in by_scheme["lors"])
    assert by_scheme["lowrank"] | by_scheme["lors"] == set(plan.weights)


def test_a_toml_recipe_is_the_same_as_one_in_python(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[[rule]]\nscheme = "lors"\ninclude = ["*attn*"]\nrank = 4\nk = [1, 2, 3]\n'
        '[[rule]]\nscheme = "tied"\nexclude = "blocks.0.*"\nscale = false\n'
    )
    recipe = Recipe.from_toml(path)
    assert recipe == Recipe(
        (
            Rule("lors", {"rank": 4, "k": [1, 2, 3]}, ("*attn*",)),
            Rule("tied", {"scale": False}, ("*",), ("blocks.0.*",)),
        )
    )
    plan = tiedconv.plan(model("timm-vit"), recipe=recipe)
    assert not any(n.startswith("blocks.0.mlp") for n in plan.weights)
    assert recipe.to_json()["rules"][0]["k"] == [1, 2, 3]
    path.write_text('params = "70%"\n[[rule]]\nscheme = "lors"\n')
    assert Recipe.from_toml(path) == Recipe((Rule("lors"),), Budget("70%"))


@pytest.mark.parametrize(
    ("scheme", "options", "named"),
    [
        ("lors", {"rank": 4}, "rank"),
        ("lors", {"rank": 0.1, "k": [1, 2, 3], "groups": "all"}, "rank and k"),
        ("tied", {"rank": 2}, "rank"),
        ("lors-adaptive", {"rank": 2, "k": [1, 2, 3]}, "k"),
    ],
)
def test_ranks_are_given_or_chosen_by_a_budget(
    scheme: str, options: dict[str, Any], named: str
) -> None:
    with raises(RecipeError, "rank-and-budget", named):
        Recipe.of(scheme, params="50%", **options)
    Recipe.of(scheme, **options)
    Recipe.of(scheme, params="50%", **{k: v for k, v in options.items() if k not in named})
    Recipe((Rule(scheme, options),), Budget("50%"))  # as histories of older versions have it


@pytest.mark.parametrize("params", ["100%", "10M", "1b"])
def test_a_budget_that_saves_nothing_is_refused(params: str) -> None:
    for scheme in ("tied", "auto"):
        with raises(RecipeError, "budget-saves-nothing"):
            tiedconv.plan(model("timm-vit"), scheme, params=params)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("rules = 3", "recipe-malformed"),
        ('params = "50%"', "recipe-malformed"),
        ("", "recipe-malformed"),
        ("rule = 3", "recipe-malformed"),
        ("rule = [3]", "recipe-malformed"),
        ("rule = []", "recipe-malformed"),
        ('[[rule]]\nscheme = "nothing"', "unknown-scheme"),
        ("[[rule]]\nscheme = 3", "unknown-scheme"),
        ("[[rule]]\nnope = 3", "unknown-option"),
        ('[[rule]]\nscheme = "tied"\nscale = "yes"', "wrong-option-type"),
        ("[[rule]]\ninclude = 3", "patterns-invalid"),
        ("[[rule]]\nexclude = [3]", "patterns-invalid"),
        ('params = "half"\n[[rule]]\nscheme = "tied"', "budget-invalid"),
        ("params = 0\n[[rule]]\n", "budget-invalid"),
        ("params = [1]\n[[rule]]\n", "budget-invalid"),
        ("[[rule]", "recipe-unreadable"),
    ],
)
def test_a_recipe_that_means_nothing_is_refused(text: str, code: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with raises(UserError, code):
        Recipe.from_toml(path)


def test_a_recipe_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, tmp_path / "r.toml"):
        with raises(RecipeError, "recipe-unreadable"):
            Recipe.from_toml(path)


@pytest.mark.parametrize(
    ("scheme", "options", "code"),
    [
        ("teid", {}, "unknown-scheme"),
        ("LORS", {}, "unknown-scheme"),
        ("", {}, "unknown-scheme"),
        ("tied", {"ranks": 3}, "unknown-option"),
        ("shared", {"rank": 3}, "unknown-option"),
        ("tied", {"scale": 1}, "wrong-option-type"),
        ("tied", {"rank": "8"}, "wrong-option-type"),
        ("tied", {"rank": True}, "wrong-option-type"),
        ("tied", {"pairing": "q-k"}, "unknown-choice"),
        ("tied", {"first": "last"}, "unknown-choice"),
        ("lors", {"groups": "some"}, "invalid-groups"),
        ("lors", {"rank": -1}, "invalid-rank"),
        ("lors", {"rank": -0.5}, "invalid-rank"),
        ("lors", {"rank": [1, 2]}, "wrong-rank-count"),
        ("lors", {"k": [1, 2]}, "wrong-rank-count"),
        ("lors", {"k": [1, 2.5, 3]}, "wrong-option-type"),
        ("lors", {"bases": 0}, "invalid-bases"),
        ("lors", {"bases": 5}, "too-many-bases"),
        ("lors", {"rank": 1.5}, "invalid-rank"),
        ("lors", {"bases": 2, "base_rank": 4}, "invalid-bases"),
        ("lors", {"base_rank": -1}, "invalid-rank"),
        ("tied", {"base_rank": -0.5}, "invalid-rank"),
        ("basis", {"base_rank": 0}, "invalid-rank"),
        ("basis", {"base_rank": -1}, "invalid-rank"),
        ("basis", {"owners": [0, 0]}, "internal-option"),
        ("basis", {"groups": "some"}, "invalid-groups"),
        ("auto", {"rank": 3}, "unknown-option"),
        ("lors", {"rank": math.nan}, "invalid-rank"),
        ("lors", {"rank": math.inf}, "invalid-rank"),
    ],
)
def test_a_wrong_scheme_or_option_is_refused(
    scheme: str, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SchemeError) as caught:
        tiedconv.plan(model("timm-vit"), scheme, **options)
    assert caught.value.code == code


def test_an_unknown_scheme_or_option_lists_the_known_ones() -> None:
    for scheme, options, code, listed in (
        ("teid", {}, "unknown-scheme", ["tied"]),
        ("LORS", {}, "unknown-scheme", ["auto, basis, lors, lors-adaptive, lowrank"]),
        ("tied", {"pairing": "q-k"}, "unknown-choice", ["kv-qo, vo-qk"]),
    ):
        with raises(SchemeError, code, *listed):
            make_scheme(scheme, options)


@pytest.mark.parametrize(
    ("text", "original", "count"),
    [
        ("50%", 1000, 500),
        ("12.5 %", 1000, 125),
        ("99.9%", 1000, 999),
        ("12M", 10**10, 12_000_000),
        ("1.5k", 10**10, 1500),
        ("2b", 10**10, 2_000_000_000),
        ("1_000", 10**10, 1000),
        ("1,000", 10**10, 1000),
    ],
)
def test_budgets(text: str, original: int, count: int) -> None:
    assert Budget(text).resolve(original) == count


@pytest.mark.parametrize(
    "text", ["", "half", "0%", "101%", "-5%", "0", "50 per cent", "1e6", "%", "nan", "١%%", "0.5"]
)
def test_what_is_no_budget(text: str) -> None:
    with raises(RecipeError, "budget-invalid"):
        Budget(text)


def test_a_budget_out_of_reach_names_the_smallest_and_ways_that_reach_it() -> None:
    original = tiedconv.plan(model("timm-vit")).original
    for scheme in schemes():
        # With a budget, all but this one may store what they share as a product of thin matrices.
        share = 40 if scheme == "shared" else 5
        with pytest.raises(BudgetError) as caught:
            tiedconv.plan(model("timm-vit"), scheme, params=f"{share}%")
        with on_command_line():
            message = str(caught.value)
        found = re.search(r"stores at least ([\d,]+) \(", message)
        assert found is not None
        smallest = int(found[1].replace(",", ""))
        assert tiedconv.plan(model("timm-vit"), scheme, params=str(smallest)).stored == smallest
        with pytest.raises(BudgetError):
            tiedconv.plan(model("timm-vit"), scheme, params=str(smallest - 1))
        ways = list(named_ways(message))
        assert ways or share == 5
        for other, options, size in ways:
            plan = tiedconv.plan(model("timm-vit"), other, **options)
            assert plan.stored == size <= share / 100 * original


def test_a_model_that_cannot_be_halved_gets_an_error_that_names_a_scheme_that_halves_it() -> None:
    for name in ("torchvision-resnet", "timm-resnet"):
        with raises(BudgetError, "budget-too-small", "50%"):
            tiedconv.plan(model(name), "auto", include="layer1*")
        whole = tiedconv.plan(model(name), "auto")
        assert whole.stored <= 0.5 * whole.original
        assert tiedconv.plan(model(name), "auto", params="70%").stored > 0


@pytest.mark.slow
def test_a_budget_out_of_reach_of_a_scheme_is_met_with_a_factored_base() -> None:
    for name, scheme in itertools.product(("timm-vit", "hf-imagegpt"), ("tied", "lors")):
        whole = tiedconv.plan(model(name), scheme, rank=0)
        budget = whole.stored - 1  # whatever ranks there are: W itself is too large
        plan = tiedconv.plan(model(name), scheme, params=str(budget))
        assert plan.stored <= budget
        assert {g.scheme for g in plan.groups} == {scheme}
        assert all(g.options["base_rank"] for g in plan.groups)
        tied = state_of(tiedconv.convert(model(name), scheme, params=str(budget))).plan
        assert 0.97 * budget < tied.stored <= budget
        assert all(g.options["base_rank"] for g in tied.groups)
        # Who asks for W whole with its ranks and no budget gets that.
        assert not any(g.options["base_rank"] for g in whole.groups)


def test_with_a_factored_base_a_layer_without_an_equal_is_of_low_rank() -> None:
    name = "torchvision-resnet"
    for core, options in itertools.product((0, 2), ({"rank": 1}, {"rank": 1, "k": [1, 2]})):
        plan = tiedconv.plan(model(name), "lors", base_rank=core, include="layer1*", **options)
        unmatched = [g for g in plan.groups if len(g.members) == 1]
        assert bool(unmatched) == bool(core)
        assert all(set(g.factors) == {"base_left", "base_right"} for g in unmatched)
        assert any(len(g.members) > 1 and "B0" in g.factors for g in plan.groups)
    # So a budget reaches what residuals beside whole layers can't.
    whole = tiedconv.plan(model(name), "lors", rank=0)
    budget = whole.stored // 2
    assert tiedconv.plan(model(name), "lors", params=str(budget)).stored <= budget
    tied = tiedconv.convert(model(name), "lors", params=str(budget))
    assert 0.95 * budget < state_of(tied).plan.stored <= budget


def named_ways(message: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """The ways that a message offers: `--scheme S --option k=v reaches N`."""
    for scheme, options, size in re.findall(
        r"--scheme (\w+)((?: --option \S+)*) reaches ([\d,]+)", message
    ):
        values = {}
        for key, value in re.findall(r"--option (\w+)=(\S+)", options):
            plain = {"true": True, "false": False}
            number = re.fullmatch(r"\d+(\.\d+)?", value)
            read = (float if "." in value else int)(value) if number else value
            values[key] = plain.get(value, read)
        yield scheme, values, int(size.replace(",", ""))


def test_the_ways_offered_are_smaller_and_true() -> None:
    for name in ("torchvision-resnet", "timm-vit", "perceptron"):
        info = inspect_model(model(name))
        recipe = Recipe.of("lors")
        current = tiedconv.plan(model(name), "lors").stored
        ways = smaller_options(info, recipe)
        assert ways
        for text, size in ways:
            (scheme, options, again), *_ = named_ways(f"{text} reaches {size:,}")
            assert again == size < current
            assert tiedconv.plan(model(name), scheme, **options).stored == size


SHARES = {"torchvision-resnet": ("97%", "90%")}  # half of its numbers are out of reach
BUDGETS = [
    (name, scheme, params)
    for name in ("timm-vit", "torchvision-resnet", "hf-imagegpt", "torch-transformer")
    for scheme in RANKED
    for params in SHARES.get(name, ("95%", "80%"))
]


FAST = covering([(name, scheme) for name, scheme, _ in BUDGETS], 1, 2)


@pytest.mark.parametrize(
    ("name", "scheme", "params"), slow_unless(BUDGETS, [b for b in BUDGETS if b[:2] in FAST])
)
def test_a_budget_is_never_exceeded_and_nearly_used(name: str, scheme: str, params: str) -> None:
    info = inspect_model(model(name))
    most = tiedconv.plan(model(name), scheme, rank=10**6)
    budget = Budget(params).resolve(most.original)
    dry = tiedconv.plan(model(name), scheme, params=params)
    fitted = state_of(tiedconv.convert(model(name), scheme, params=params)).plan
    dearest = max(
        sum(m.shape) for t in draft(info, Recipe.of(scheme)) for d in t.drafts for m in d.members
    )
    for plan in (dry, fitted):
        assert plan.stored <= budget
        if not saturated(plan):
            assert plan.stored > budget - max(dearest, 0.01 * budget)


def saturated(plan: Plan) -> bool:
    """Whether every residual has the largest rank that still saves anything."""
    return all(
        rank >= math.prod(shape) // sum(shape)
        for g in plan.groups
        if g.scheme != "kept"
        for rank, shape, takes in zip(
            g.options["rank"],
            [m.shape for m in g.members],
            all_schemes()[g.scheme]().rank_slots(len(g.members)),
            strict=True,
        )
        if takes
    )


@pytest.mark.parametrize("scheme", slow_unless(RANKED, [s for s in RANKED if s != "tied"]))
def test_a_larger_budget_never_fits_worse(scheme: str) -> None:
    errors = []
    for params in ("65%", "75%", "85%", "95%"):
        tied = tiedconv.convert(model("timm-vit"), scheme, params=params)
        total = 0.0
        for group in state_of(tied).plan.groups:
            assert group.error is not None
            total += group.error**2 * group.original
        errors.append(total)
    assert errors == sorted(errors, reverse=True)


def drafts_of(name: str, scheme: str) -> tuple[list[Draft], WeightEditor]:
    info = inspect_model(model(name))
    own = model(name).state_dict()
    drafts = [
        Draft(d.name, d.scheme.with_residual_ranks([d.scheme.min_rank] * len(d.members)), d.members)
        for t in draft(info, Recipe.of(scheme))
        for d in t.drafts
    ]
    return drafts, WeightEditor({n: own[n] for n in info.shapes})


@pytest.mark.parametrize("scheme", ["lors", "lowrank"])
@pytest.mark.parametrize("spare", [0, 150, 3_000, 12_000])
def test_no_exchange_of_one_rank_for_another_removes_more_error(scheme: str, spare: int) -> None:
    drafts, editor = drafts_of("timm-vit", scheme)
    taken: list[tuple[float, int]] = []  # error removed and cost of the last rank of each matrix
    untaken: list[tuple[float, int]] = []
    spent = 0
    for before, after in zip(drafts, allocate(drafts, limits(spare), editor), strict=True):
        assert isinstance(after.scheme, Ranked)
        assert isinstance(after.scheme.rank, tuple)
        matrices = [m.matrix_of(editor.tensors[m.slot.tensor]) for m in before.members]
        for j, residual in enumerate(before.scheme.residuals(matrices)):
            assert residual is not None
            rank, least = after.scheme.rank[j], before.scheme.min_rank
            gains = spectrum(residual).square()
            cost = sum(before.shapes[j])
            spent += (rank - least) * cost
            limit = math.prod(before.shapes[j]) // cost
            assert least <= rank <= max(least, limit)
            if rank > least:
                taken.append((float(gains[rank - 1]), cost))
            if rank < limit:
                untaken.append((float(gains[rank]), cost))
    assert spent <= spare
    assert bool(taken) == (spare > 100)
    left = spare - spent
    for gain, cost in taken:
        for other, price in untaken:
            # Where the exchange is affordable it must not help, up to the rounding of float32.
            if price <= cost:
                assert other <= gain * (1 + 1e-4)
    assert all(price > left for _, price in untaken)


def test_a_budget_of_nearly_all_is_not_exceeded() -> None:
    tied = tiedconv.convert(model("timm-vit"), "tied", params="99.9%")
    plan = state_of(tied).plan
    assert plan.stored < plan.original


def test_a_budget_without_ranks_is_met_or_refused() -> None:
    stored = tiedconv.plan(model("timm-vit"), "shared").stored
    assert tiedconv.plan(model("timm-vit"), "shared", params=str(stored)).stored == stored
    assert tiedconv.convert(model("timm-vit"), "shared", params="90%") is not None


@functools.cache
def ways_to_convert() -> tuple[dict[str, Any], ...]:
    return ({"scheme": "tied"}, {"scheme": "lors", "params": "80%"}, {"scheme": "shared"})


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-resnet", "aliased"])
def test_the_given_model_stays_as_it_is_unless_asked(name: str) -> None:
    micro = all_micros()[name]
    for options in ways_to_convert():
        given = micro.model()
        before = {n: t.clone() for n, t in given.state_dict().items()}
        tied = tiedconv.convert(given, **options)
        assert tied is not given
        assert not is_tied(given)
        assert all(torch.equal(before[n], t) for n, t in given.state_dict().items())
        assert set(before) == set(given.state_dict())
        assert torch.equal(micro.logits(given), original_logits(name))
        shared = {p.data_ptr() for p in tied.parameters()} & {
            p.data_ptr() for p in given.parameters()
        }
        assert not shared
        assert tiedconv.convert(given, **options, inplace=True) is given
        assert is_tied(given)


def test_a_refused_conversion_in_place_leaves_the_model_alone() -> None:
    given = model("timm-vit")
    before = {n: t.clone() for n, t in given.state_dict().items()}
    for options in ({"params": "1%"}, {"include": ["x"]}, {"rank": [1, 2, 3, 4]}):
        with pytest.raises(TiedconvError):
            tiedconv.convert(given, "lors", inplace=True, **options)
        assert not is_tied(given)
        assert all(torch.equal(before[n], t) for n, t in given.state_dict().items())


def test_a_tied_model_is_not_tied_again() -> None:
    tied = tiedconv.convert(model("timm-vit"))
    with raises(UserError, "already-tied"):
        tiedconv.convert(tied)
    with raises(UserError, "not-tied"):
        tiedconv.report(model("timm-vit"))


def test_progress_counts_every_group_once() -> None:
    seen: list[tuple[int, int]] = []
    tied = tiedconv.convert(model("timm-vit"), "tied", on_group=lambda *done: seen.append(done))
    count = len(state_of(tied).plan.groups)
    assert seen == [(i + 1, count) for i in range(count)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if i % 2 else name
        for i, name in enumerate(all_micros())
    ],
)
def test_every_scheme_alone_finds_only_what_the_families_found(name: str) -> None:
    shapes = inspect_model(model(name)).shapes
    for scheme in all_schemes():
        try:
            extra = OPTIONS.get(scheme, {}) if MEANT_FOR.get(scheme, (name,))[0] == name else {}
            plan = tiedconv.plan(model(name), scheme, **extra)
        except NothingToConvert:
            continue
        assert {**plan.kept, **{n: e.shape for n, e in plan.weights.items()}} == shapes
        rows: dict[str, list[tuple[int, int]]] = {}
        for group in plan.groups:
            for m in group.members:
                rows.setdefault(m.slot.tensor, []).append((m.slot.start, m.slot.stop))
        assert rows.keys() == plan.weights.keys()
        for spans in rows.values():
            # Every row is given once: sorted spans follow on each other without overlap.
            ordered = sorted(spans)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(ordered))


def test_one_pattern_may_be_a_text() -> None:
    vit = model("timm-vit")
    for option in ("include", "exclude"):
        one = tiedconv.plan(vit, "lowrank", **{option: "*mlp*"})
        assert one == tiedconv.plan(vit, "lowrank", **{option: ["*mlp*"]})
        assert one != tiedconv.plan(vit, "lowrank")
