"""Times of layers in place of counts: measured, kept, and kept to."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cli_helpers import refused, run
from error_codes import raises
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.commands import latency
from tiedconv.conversion.candidates import memory_store
from tiedconv.conversion.pipeline import Planned, plan_on
from tiedconv.conversion.workload import count_macs, counted
from tiedconv.core.expr import MatMul, Ref
from tiedconv.core.pad import Pad
from tiedconv.core.workload import Piece, Times, Use, Workload
from tiedconv.errors import BudgetError, MissingExtra, RecipeError, UserError
from tiedconv.planning.budget import Budget, RunsOn
from tiedconv.planning.planner import choose_ranks
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.example_inputs import Arguments
from tiedconv.runtime.macs import saved_work, work_of
from tiedconv.runtime.tie import state_of
from tiedconv.timing import (
    all_runtimes,
    choose_runtime,
    corrected,
    measure_times,
    together,
    whole_plan,
)
from tiedconv.timing import table as tables
from tiedconv.timing.runtimes import Run, Runtime
from tiedconv.timing.sites import Site
from tiedconv.timing.table import Rehearsed, TimeTable

MICRO = all_micros()["timm-vit"]
FIXED, EACH = 2_000.0, 0.5  # nanoseconds of a layer, and of each multiply-add of all rows


class Ideal(Runtime):
    """Times that follow from shapes: no clock is read."""

    name: ClassVar = "onnx"
    limit: ClassVar = 0.95
    package: ClassVar = "torch"
    module: ClassVar = "torch"
    extra: ClassVar = ""
    slower: float = 1.0  # than factors: a weight itself, for each multiply-add
    in_plans: float = 1.0  # times as much as it seems is saved in a model of a plan
    apart: float = 0.0  # a part of a layer's time that it takes only if it runs alone

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        rows = math.prod(x.shape[:-1])
        macs = sum(math.prod(p.shape) for p in layers.parameters() if p.ndim > 1)
        each = EACH * (self.slower if len(layers) == 1 else 1.0)
        alone = self.apart * each * rows * macs
        return Fixed(FIXED * len(layers) + each * rows * macs + alone)

    def model(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """A fixed part, and the layers that run; two in place of one are thin."""
        taken = [200_000.0]

        def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            each = EACH * (1.0 if module in thin else self.slower)
            if module not in second:
                rows[module] = math.prod(given[0].shape[:-1])
            count = rows[second.get(module, module)]
            taken.append(FIXED + each * count * module.get_parameter("weight").numel())

        rows: dict[nn.Module, int] = {}  # of features, as those of a pair's first layer
        pairs = [m for m in model.modules() if type(m) is nn.Sequential and len(m) == 2]
        second = {pair[1]: pair[0] for pair in pairs}
        thin = {layer for pair in pairs for layer in pair}
        layers = [m for m in model.modules() if type(m) in (nn.Linear, nn.Conv2d)]
        hooks = [layer.register_forward_pre_hook(note) for layer in layers]
        model(*batch[0], **batch[1])
        for hook in hooks:
            hook.remove()
        return Fixed(sum(taken))

    def tied(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """Its thin layers, which save another part of the time than those that were timed."""
        run = self.model(_two_layers(copy.deepcopy(model)), batch, folder, threads)
        own = self.model(tiedconv.untie(model), batch, folder, threads)
        assert isinstance(run, Fixed)
        assert isinstance(own, Fixed)
        return Fixed(own.nanoseconds - self.in_plans * (own.nanoseconds - run.nanoseconds))


class Fixed:
    def __init__(self, nanoseconds: float) -> None:
        self.nanoseconds = nanoseconds

    def __call__(self) -> None: ...


@pytest.fixture
def ideal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """The runtime of fixed times, in an empty cache; counts measurements."""
    measured: list[int] = []

    def seconds(run: Any, count: int = 1) -> float:
        return float(run.nanoseconds) / 1e9

    def in_turn(runs: Any, *_: Any, **__: Any) -> list[float]:
        measured.append(len(runs))
        return [seconds(run) for run in runs]

    def ratio_in_turn(run: Any, base: Any, _: int) -> float:
        return seconds(run) / seconds(base)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "choose_runtime", lambda name: Ideal())
    monkeypatch.setattr(whole_plan, "choose_runtime", lambda name: Ideal())
    monkeypatch.setattr(whole_plan, "ratio_in_turn", ratio_in_turn)
    monkeypatch.setattr(tables, "seconds", seconds)
    monkeypatch.setattr(tables, "in_turn", in_turn)
    monkeypatch.setattr(together, "ratio_in_turn", ratio_in_turn)
    return measured  # type: ignore[return-value]


def workload(model: nn.Module) -> Workload:
    found = count_macs(model, example=MICRO.input()[:1])
    assert found is not None
    return found


def test_a_time_is_a_line_through_the_measured_ranks(ideal: list[int]) -> None:
    model = MICRO.model()
    table = measure_times(model, workload(model), "onnx")
    assert table.workload.unit == "ns"
    for name, use in table.workload.uses.items():
        for piece in use.pieces:
            if piece.times is None or ".attn." not in name:
                continue
            rows, columns = dict(model.named_parameters())[name].shape
            assert piece.times.whole == pytest.approx(FIXED + EACH * piece.rows * rows * columns)
            assert piece.times.fixed == pytest.approx(2 * FIXED, rel=0.02)
            assert piece.times.each == pytest.approx(EACH * piece.rows, rel=0.02)


@pytest.mark.parametrize("apart", [0.0, 0.5, 3.0])
def test_savings_are_those_of_the_whole_model(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    """What a layer takes only if it runs alone is saved in no model."""
    monkeypatch.setattr(Ideal, "apart", apart)
    model, x = MICRO.model(), MICRO.input()[:1]
    table = measure_times(model, workload(model), "onnx")
    assert table.together is not None
    # Factors of the middle rank take a fixed part more and 0.45 of the multiply-adds.
    assert table.together == pytest.approx(1 / (1 + apart), rel=0.2)
    made = tiedconv.convert(MICRO.model(), "lowrank", latency="0.85x", example=x)
    predicted = state_of(made).history[0]["latency"]["predicted_ns"]
    dense = Ideal().model(model, ((x,), {}), Path(), 1)
    thin = Ideal().model(_two_layers(made), ((x,), {}), Path(), 1)
    assert isinstance(dense, Fixed)
    assert isinstance(thin, Fixed)
    assert predicted / table.workload.total == pytest.approx(
        thin.nanoseconds / dense.nanoseconds, abs=0.03
    )


@pytest.mark.parametrize("saving", [0.7, 1.0, 1.3])
def test_a_plan_is_corrected_by_a_whole_model_of_such_a_plan(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch, saving: float
) -> None:
    seen: list[Rehearsed] = []

    def noted(*given: Any) -> Rehearsed:
        seen.append(rehearsal(*given))
        return seen[-1]

    rehearsal = latency._rehearsal
    monkeypatch.setattr(latency, "_rehearsal", noted)
    monkeypatch.setattr(Ideal, "in_plans", saving)
    model, x = MICRO.model(), MICRO.input()[:1]
    made = tiedconv.convert(MICRO.model(), "lowrank", latency="0.85x", example=x)
    record = state_of(made).history[0]["latency"]
    own = Ideal().model(model, ((x,), {}), Path(), 1)
    run = Ideal().tied(copy.deepcopy(made), ((x,), {}), Path(), 1)
    assert isinstance(own, Fixed)
    assert isinstance(run, Fixed)
    predicted = record["predicted_ns"] / record["original_ns"]
    assert predicted <= 0.85
    assert run.nanoseconds / own.nanoseconds == pytest.approx(predicted, rel=0.04)
    assert seen[0].measured is not None
    assert 1 - seen[0].measured == pytest.approx(saving * (1 - seen[0].predicted), rel=0.1)
    if saving == 1.0:
        assert len(seen) == 1


def test_a_plan_that_can_not_be_timed_is_reported(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*given: Any) -> Run:
        raise RuntimeError

    monkeypatch.setattr(Ideal, "tied", refuses)
    recipe, model = Recipe.of("lowrank", latency="0.85x"), MICRO.model()
    found = counted(model, None, MICRO.input()[:1])

    def planning(times: TimeTable | None) -> Planned:
        assert times is not None
        return plan_on(model, recipe, times=times.workload)

    _, times = latency.in_time(model, found, recipe, planning)
    assert times is not None
    (seen,) = times.rehearsed
    assert seen.measured is None
    assert "could not be timed" in str(times)
    assert "takes 0.66x" in str(dataclasses.replace(times, rehearsed=(Rehearsed(0.6, 0.66),)))


def installed(name: str) -> Runtime:
    """The runtime, or the test is skipped."""
    try:
        return choose_runtime(name)
    except MissingExtra:
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("name", list(all_runtimes()))
def test_a_runtime_runs_a_tied_model(name: str, tmp_path: Path) -> None:
    runtime = installed(name)
    model, x = MICRO.model(), MICRO.input()[:1]
    with torch.no_grad():
        tied = tiedconv.convert(model, "lowrank", params=0.6, example=x)
        expected = tied(x)
        found = runtime.tied(copy.deepcopy(tied), ((x,), {}), tmp_path, 1)()
    value = found if isinstance(found, Tensor) else torch.as_tensor(found[0])
    torch.testing.assert_close(value, expected, atol=1e-4, rtol=1e-3)


def _two_layers(model: nn.Module) -> nn.Module:
    """A plain model with two thin layers for each weight of low rank that pays."""
    plan, plain = state_of(model).plan, tiedconv.untie(model)
    for name, expr in plan.weights.items():
        layer = name.removesuffix(".weight")
        old, rows, columns = plain.get_submodule(layer), expr.shape[0], math.prod(expr.shape[1:])
        rank = min(min(shape) for shape in expr.refs.values())
        if len(expr.refs) != 2 or rank * (rows + columns) > 0.95 * rows * columns:
            continue
        size = (1, expr.shape[1], 1, 1) if isinstance(old, nn.Conv2d) else (1, 1, columns)
        how = {
            k: getattr(old, f"{k}_size" if k == "kernel" else k)
            for k in ("kernel", "stride", "padding", "dilation")
            if isinstance(old, nn.Conv2d)
        }
        plain.set_submodule(layer, Site(rows, columns, size, **how).layers(rank))
    return plain


def test_a_model_that_takes_no_two_layers_is_reported(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Ideal.model

    def refuses(self: Ideal, model: nn.Module, *given: Any) -> Run:
        if any(type(m) is nn.Sequential and len(m) == 2 for m in model.modules()):
            raise AttributeError("weight")
        return whole(self, model, *given)

    monkeypatch.setattr(Ideal, "model", refuses)
    model = MICRO.model()
    table = measure_times(model, workload(model), "onnx")
    assert table.together is None
    assert "not together" in str(table)


def test_times_are_kept_until_what_they_depend_on_changes(ideal: list[int]) -> None:
    model = MICRO.model()
    first = measure_times(model, workload(model), "onnx")
    count = len(ideal)
    assert not first.date
    assert first.path is not None
    again = measure_times(model, workload(model), "onnx")
    assert (again.workload, len(ideal)) == (first.workload, count)
    assert again.date
    assert "of " in str(again)
    for change in ({"batch_size": 2}, {"threads": 2}):
        before = len(ideal)
        measure_times(model, workload(model), "onnx", **change)
        assert len(ideal) == before + count
    kept = json.loads(first.path.read_text())
    older = {name: value for name, value in kept.items() if name != "together"}
    for damaged in ("{", json.dumps(older), json.dumps({**kept, "sites": []})):
        first.path.write_text(damaged)
        assert not measure_times(model, workload(model), "onnx").date


def test_a_folder_that_can_not_be_written_is_told(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = MICRO.model()
    table = measure_times(model, workload(model), "onnx")
    assert table.path is None
    assert "not kept" in str(table)


@pytest.mark.parametrize("scheme", ["lowrank", "basis", "auto"])
def test_a_budget_of_time_is_kept(ideal: list[int], scheme: str) -> None:
    x = MICRO.input()[:1]
    model = tiedconv.convert(MICRO.model(), scheme, latency="0.85x", example=x)
    record = state_of(model).history[0]["latency"]
    plain = MICRO.model()
    times = measure_times(plain, workload(plain), "onnx").workload
    assert record["original_ns"] == times.total
    assert record["predicted_ns"] == work_of(state_of(model).plan.weights, times)
    assert 0.75 * times.total <= record["predicted_ns"] <= 0.85 * times.total
    assert (record["on"], record["on_batch_size"]) == ("onnx", 1)
    assert state_of(model).history[0]["recipe"]["latency"] == "0.85x"


@pytest.mark.parametrize("scheme", ["lowrank", "auto"])
def test_it_is_kept_where_a_weight_is_much_slower_than_its_factors(
    ideal: list[int], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    # Above 0.95 of the multiply-adds the weight itself runs, whatever its time.
    monkeypatch.setattr(Ideal, "slower", 1.6)
    x = MICRO.input()[:1]
    model = tiedconv.convert(MICRO.model(), scheme, latency="0.9x", example=x)
    record = state_of(model).history[0]["latency"]
    assert record["predicted_ns"] <= 0.9 * record["original_ns"]


def drawn(work: Workload, model: nn.Module, rng: random.Random) -> Workload:
    """Times of any runtime: layers, fixed parts and slopes that no straight line foresees."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    limit, mess = rng.choice([None, 0.95]), rng.choice([0.1, 0.5])
    uses = {}
    for name, use in work.uses.items():
        pieces = []
        for piece in use.pieces:
            macs = piece.rows * (piece.stop - piece.start) * math.prod(shapes[name][1:])
            whole = 1000 * rng.uniform(1 - mess, 1 + 3 * mess)
            whole += macs * rng.uniform(1 - mess, 1 + mess)
            fixed, each = rng.uniform(0, 1.5 * mess) * whole, piece.rows * rng.uniform(0.2, 2)
            pieces.append(dataclasses.replace(piece, times=Times(whole, fixed, each, limit)))
        uses[name] = Use(sum(p.times.whole for p in pieces if p.times), tuple(pieces))
    total = round(1.1 * sum(use.work for use in uses.values()))
    return Workload(total, uses, work.inputs, "ns")


# The first four took more than was asked for until a plan was chosen again.
@pytest.mark.parametrize("seed", [31, 36, 102, 149, *range(8)])
def test_a_plan_takes_no_longer_than_asked_whatever_the_times(seed: int) -> None:
    rng = random.Random(seed)
    micro = all_micros()[rng.choice(["torchvision-resnet", "hf-vit"])]
    model = micro.model()
    work = count_macs(model, example=micro.input()[:1])
    assert work is not None
    times = drawn(work, model, rng)
    scheme, share = rng.choice(["lowrank", "basis", "auto"]), rng.choice([0.5, 0.7, 0.9])
    try:
        planned = plan_on(model, Recipe.of(scheme, latency=f"{100 * share}%"), times=times)
    except BudgetError:
        return  # no plan is that fast, which is said before any is made
    editor = memory_store(model, planned.info).open().editor
    plan = choose_ranks(planned.info, planned.outlines[0], editor, {})
    assert work_of(plan.weights, times) <= share * times.total


def test_what_can_not_be_reached_is_refused(ideal: list[int]) -> None:
    x = MICRO.input()[:1]
    for scheme, budget in (("shared", "0.9x"), ("lowrank", "0.01x")):
        with raises(BudgetError, "latency-too-low", "ms"):
            tiedconv.convert(MICRO.model(), scheme, latency=budget, example=x)
    with raises(RecipeError, "macs-and-latency"):
        tiedconv.convert(MICRO.model(), latency=0.9, macs=0.9, example=x)


def times(limit: float | None) -> Use:
    return Use(100.0, (Piece(0, 8, 5, Times(100.0, 30.0, 2.0, limit)),))


def test_the_form_that_the_runtime_takes_is_counted() -> None:
    low = MatMul(Ref("b", (8, 1)), Ref("a", (1, 8)))  # 16 of 64 multiply-adds
    high = MatMul(Ref("b", (8, 3)), Ref("a", (3, 8)))  # 48 of 64
    assert saved_work(low, times(None)) == 100 - (30 + 2 * 16)
    assert saved_work(high, times(None)) == 0  # the weight takes less time
    assert saved_work(high, times(0.95)) == 100 - (30 + 2 * 48)  # applied all the same
    assert saved_work(high, times(0.5)) == 0
    assert saved_work(Ref("w", (8, 8)), times(None)) == 0


@pytest.mark.parametrize("limit", [None, 0.5])
def test_a_narrow_layer_takes_its_part_of_the_time(limit: float | None) -> None:
    narrow = Pad(Ref("w", (6, 8)), 0, 8)  # 2 of 8 rows are zeros
    assert saved_work(narrow, times(limit)) == pytest.approx(25)
    less = Workload(200, {"w": times(limit)}, (), "ns")
    assert saved_work(narrow, corrected(less, 0.6).uses["w"]) == pytest.approx(15)


def test_a_part_of_rows_takes_a_part_of_the_time() -> None:
    piece = times(None).pieces[0]
    part = piece.within(4, 6)
    assert part is not None
    assert part.times == Times(25.0, 7.5, 2.0, None)
    assert piece.within(8, 9) is None


@pytest.mark.parametrize("name", list(all_runtimes()))
def test_a_runtime_computes_what_the_layers_do(name: str, tmp_path: Path) -> None:
    runtime = installed(name)
    torch.manual_seed(0)
    convolution = Site(8, 4 * 9, (2, 4, 7, 7), (3, 3), (2, 2), (1, 1), (1, 1))
    depthwise = Site(4, 9, (2, 4, 7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 4)
    for site in (Site(8, 6, (2, 5, 6)), convolution, depthwise):
        for rank in (None, 3) if site.groups == 1 else (None,):
            layers, x = site.layers(rank), torch.randn(site.shape)
            found = runtime.layers(layers, x, 1)()
            value = found if name == "torch" else found[0]
            with torch.no_grad():
                expected = layers(x)
            torch.testing.assert_close(torch.as_tensor(value), expected, atol=1e-5, rtol=1e-4)
    images = torch.zeros(1, *MICRO.input().shape[1:])
    runtime.model(MICRO.model(), ((images,), {}), tmp_path, 1)()


def test_times_are_measured_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tables, "ROUNDS", 1)
    model, seen = all_micros()["torchvision-resnet"].model(), list[tuple[int, int]]()
    x = all_micros()["torchvision-resnet"].input()[:1]
    counted = count_macs(model, example=x)
    assert counted is not None
    table = measure_times(model, counted, "torch", on_site=lambda *at: seen.append(at))
    assert seen[-1] == (table.layers, table.layers)
    assert 0 < sum(use.work for use in table.workload.uses.values()) < table.workload.total


def test_a_time_is_a_share_or_has_a_unit() -> None:
    for text, expected in (("0.6x", 600), ("60%", 600), ("0.5 ms", 500_000), ("2us", 2_000)):
        assert Budget(text, "latency").resolve(1_000 if expected < 1e3 else 10**9) == expected
    for text in ("0.6", "1.5x", "8", "0ms", "fast"):
        with raises(RecipeError, "budget-invalid"):
            Budget(text, "latency")
    with raises(RecipeError, "runs-on-invalid"):
        RunsOn("onnx", 0)
    with raises(UserError, "unknown-runtime"):
        choose_runtime("tensorflow")
    assert str(RunsOn("torch", 8, 2)) == "torch, batch size 8, 2 threads"


def test_a_recipe_file_may_limit_the_time(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'latency = "0.7x"\non = "torch"\non_threads = 2\n[[rule]]\nscheme = "lowrank"\n'
    )
    recipe = Recipe.from_toml(path)
    assert recipe.on == RunsOn("torch", 1, 2)
    assert recipe.work == Budget("0.7x", "latency")


def test_options_of_a_time_without_one_are_refused() -> None:
    refused("convert", "resnet18", "--on", "onnx", "--dry-run", error_code="option-without-effect")
    refused("convert", "resnet18", "--latency", "8", "--dry-run", error_code="budget-invalid")


def test_a_dry_run_times_a_model_without_weights(ideal: list[int]) -> None:
    shown = run(
        "convert", "timm:swin_tiny_patch4_window7_224", "--model-kwargs", "img_size=64",
        "window_size=4", "embed_dim=32", "depths=[2,2]", "num_heads=[2,4]",
        "--scheme", "lowrank", "--latency", "0.9x", "--dry-run", "--json",
    )  # fmt: skip
    figures = json.loads(shown.stdout)["latency"]
    assert 0 < figures["predicted_ns"] <= 0.9 * figures["original_ns"]
    assert ideal


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.safetensors"
    shown = run(
        "convert", "timm:vit_tiny_patch16_224", "--weights", "none", "--scheme", "lowrank",
        "--latency", "0.8x", "--on", "torch", "-o", path, "--json",
    )  # fmt: skip
    figures = json.loads(shown.stdout)["latency"]
    assert figures["predicted_ns"] <= 0.8 * figures["original_ns"]
    assert figures["measured"]["ratio"] > 0
