"""Conversion by images: from a model and unlabelled images to a compact file."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_helpers import Images, images_of
from error_codes import raises
from micro import all_micros
from PIL import Image
from planning_helpers import fit_plan, make_plan, weights_of
from torch import Tensor, nn

import tiedconv
from tiedconv import Recipe
from tiedconv.calibration import CalibConfig, Fitted, Joint, gather_statistics
from tiedconv.cli.progress import ConvertBar
from tiedconv.conversion.calibrate import Calibration, CandidateChosen, CandidateStarted, Measuring
from tiedconv.errors import BudgetError, CheckpointError, DataError, UserError
from tiedconv.families.inspect import inspect_model
from tiedconv.io.run_dir import CALIBRATION, FIT, RunDir
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.planning.planner import alternatives
from tiedconv.runtime.tie import dense_state_dict, is_tied, state_of

MICROS = all_micros()
PARAMS = {"timm-vit": "50%", "torchvision-vit": "50%", "torchvision-resnet": "70%"}
QUICK = CalibConfig(steps=8, passes=1, joint_steps=10, batch_size=8)


def calib_for(name: str, count: int = 24, **options: Any) -> Calibration:
    """A short calibration of a micro model."""
    usual = {"data": Images(images_of(name, count)), "config": QUICK, "device": "cpu"}
    return Calibration(**{**usual, **options})


def converted(name: str, scheme: str = "auto") -> nn.Module:
    return copy.deepcopy(_converted(name, scheme))


@functools.cache
def _converted(name: str, scheme: str) -> nn.Module:
    return tiedconv.convert(
        MICROS[name].model(), scheme, params=PARAMS[name], calib=calib_for(name)
    )


def divergence(model: nn.Module, name: str, x: Tensor) -> float:
    """The mean divergence, in nats, of a model's answers from those of the original."""
    with torch.no_grad():
        before = MICROS[name].model()(x).log_softmax(-1)
        after = model.eval()(x).log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


each_case = pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("timm-vit", "auto"),
        ("timm-vit", "tied"),
        pytest.param("timm-vit", "basis", marks=pytest.mark.slow),
        pytest.param("torchvision-vit", "lors", marks=pytest.mark.slow),
        pytest.param("torchvision-resnet", "auto", marks=pytest.mark.slow),
        pytest.param("torchvision-resnet", "lowrank", marks=pytest.mark.slow),
    ],
)


@each_case
def test_the_budget_is_kept_and_the_history_reports_the_calibration(name: str, scheme: str) -> None:
    tied = converted(name, scheme)
    assert is_tied(tied)
    state = state_of(tied)
    budget = state.plan.original * int(PARAMS[name][:-1]) // 100
    assert 0.95 * budget < state.plan.stored <= budget
    assert sum(p.numel() for p in tied.parameters()) == state.plan.stored
    (entry,) = state.history
    assert entry["step"] == "convert"
    assert entry["stored"] == state.plan.stored
    record = entry["calibration"]
    assert (record["images"], record["skipped"], record["seed"]) == (24, 0, 0)
    assert record["effort"] == "normal"
    assert 1e-4 <= record["ridge_median"] <= 1
    assert 0 <= record["kl_after"] <= record["kl_before"]
    assert record["blocks"]
    assert all(after <= before for _, before, after in record["blocks"])
    assert all(group.error is not None and 0 <= group.error < 1.01 for group in state.plan.groups)


@each_case
def test_images_bring_the_answers_nearer(name: str, scheme: str) -> None:
    """On images that the calibration never saw."""
    fresh = images_of(name, 60)[24:]
    blind = tiedconv.convert(MICROS[name].model(), scheme, params=PARAMS[name])
    assert divergence(converted(name, scheme), name, fresh) < 0.6 * divergence(blind, name, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "torchvision-resnet"])
def test_the_given_model_stays_and_the_seed_decides_the_rest(name: str) -> None:
    given = MICROS[name].model().train()
    before = {n: t.clone() for n, t in given.state_dict().items()}
    torch.manual_seed(99)  # nothing may depend on the global generator
    again = tiedconv.convert(given, "auto", params=PARAMS[name], calib=calib_for(name))
    assert given.training
    assert not is_tied(given)
    assert all(torch.equal(before[n], t) for n, t in given.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in given.parameters())
    first, second = converted(name).state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], t) for n, t in second.items())
    assert state_of(converted(name)).plan == state_of(again).plan
    assert state_of(converted(name)).history == state_of(again).history


@pytest.mark.slow
def test_a_caller_without_gradients_gets_the_same_model() -> None:
    name = "timm-vit"
    with torch.no_grad():
        made = tiedconv.convert(
            MICROS[name].model(), "auto", params=PARAMS[name], calib=calib_for(name)
        )
        assert not torch.is_grad_enabled()
    expected = converted(name).state_dict()
    assert all(torch.equal(tensor, expected[n]) for n, tensor in made.state_dict().items())


@pytest.mark.slow
def test_another_seed_gives_other_numbers() -> None:
    name = "timm-vit"
    other = CalibConfig(steps=8, passes=1, joint_steps=10, batch_size=8, seed=1)
    made = tiedconv.convert(
        MICROS[name].model(), "auto", params=PARAMS[name], calib=calib_for(name, config=other)
    )
    x = images_of(name, 2)
    with torch.no_grad():
        assert not torch.equal(made(x), converted(name)(x))


@pytest.mark.parametrize(
    "name", ["timm-vit", pytest.param("torchvision-resnet", marks=pytest.mark.slow)]
)
def test_the_file_gives_the_same_model_back(name: str, tmp_path: Path) -> None:
    tied = converted(name)
    path = tmp_path / "m.safetensors"
    size = tiedconv.save(tied, path)
    assert size < 4 * state_of(tied).plan.original + 200_000
    loaded = tiedconv.load(path, model=MICROS[name].build())
    x = images_of(name, 4)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), tied.eval()(x))
    assert state_of(loaded).plan == state_of(tied).plan
    assert state_of(loaded).history[0]["calibration"] == state_of(tied).history[0]["calibration"]
    # A dense copy is the original's class with the same answers.
    plain = MICROS[name].build()
    plain.load_state_dict(dense_state_dict(tied))
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), tied(x), atol=1e-5)


TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 5}


def folder_of(path: Path, count: int = 12) -> Path:
    """A folder of images, some in folders within it, and a file that is none."""
    (path / "more" / "deeper").mkdir(parents=True)
    for i in range(count):
        at = path / ("more/deeper" if i % 3 == 0 else ".") / f"{i}.png"
        pixels = torch.randint(0, 256, (40, 48, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(at)
    (path / "notes.txt").write_text("no image")
    return path


@pytest.mark.slow
def test_a_folder_of_images_without_classes_is_enough(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images")
    calib = Calibration(folder, images=8, config=QUICK, device="cpu", workers=0)
    tied = tiedconv.convert(
        "timm:vit_tiny_patch16_224", "auto", params="60%", weights="none", model_args=TIMM,
        calib=calib,
    )  # fmt: skip
    record = state_of(tied).history[0]["calibration"]
    assert (record["images"], record["skipped"]) == (8, 0)
    tiedconv.save(tied, tmp_path / "m.safetensors")
    loaded = tiedconv.load(tmp_path / "m.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), tied(x))


def test_a_broken_image_is_left_out_and_reported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    calib = Calibration(folder, config=QUICK, device="cpu", workers=0)
    arguments: dict[str, Any] = {
        "params": "60%", "weights": "none", "model_args": TIMM,
    }  # fmt: skip
    spec = "timm:vit_tiny_patch16_224"
    tied = tiedconv.convert(spec, "lowrank", calib=calib, **arguments)
    record = state_of(tied).history[0]["calibration"]
    assert (record["images"], record["skipped"]) == (12, 1)
    strict = Calibration(folder, config=QUICK, device="cpu", workers=0, strict=True)
    with raises(DataError, "image-unreadable"):
        tiedconv.convert(spec, "lowrank", calib=strict, **arguments)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError):
            tiedconv.convert(MICROS["timm-vit"].model(), "auto", params="50%", calib=folder)
    data = Images(torch.zeros(0, 3, 16, 16))
    with raises(DataError, "no-images"):
        tiedconv.convert(MICROS["timm-vit"].model(), "auto", params="50%", calib=data)


def test_progress_is_reported_from_the_first_image_to_the_last_step() -> None:
    events: list[Any] = []
    calib = calib_for("timm-vit", on_event=events.append)
    tiedconv.convert(MICROS["timm-vit"].model(), "lowrank", params="50%", calib=calib)
    measuring = [e for e in events if isinstance(e, Measuring)]
    assert measuring
    assert (measuring[-1].images, measuring[-1].total) == (18, 18)  # 6 are held out
    assert events.index(measuring[-1]) < min(
        i for i, e in enumerate(events) if not isinstance(e, Measuring)
    )
    assert any(isinstance(e, Joint) for e in events)


def cost_of(name: str, recipe: Recipe, x: Tensor) -> float:
    """The predicted cost of a recipe as it is, none of its alternatives."""
    info = inspect_model(MICROS[name].model())
    own = MICROS[name].model().state_dict()
    found: dict[str, KfacMetric] = {}

    def measure(moved: Mapping[str, Tensor]) -> dict[str, KfacMetric]:
        model = MICROS[name].model()
        model.load_state_dict(moved, strict=False)
        weights = weights_of(info, recipe)
        found.update(gather_statistics(model, weights, Images(x), device="cpu").metrics)
        return found

    with torch.no_grad():
        tensors = {n: own[n] for n in info.shapes}
        plan, moved = make_plan(info, recipe, tensors, measure=measure)
        return fit_plan(plan, moved, None, found)[2]


def best_cost(name: str, recipe: Recipe, x: Tensor) -> tuple[float, Recipe]:
    """The least predicted cost of a recipe and its alternatives, and which has it."""
    costs: list[tuple[float, Recipe]] = []
    for wanted in alternatives(recipe):
        try:
            costs.append((cost_of(name, wanted, x), wanted))
        except BudgetError:
            continue
    return min(costs, key=lambda pair: pair[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params"), [("timm-vit", "40%"), ("torchvision-resnet", "70%")])
def test_auto_costs_no_more_than_what_it_tries(name: str, params: str) -> None:
    x = images_of(name, 24)
    auto, _ = best_cost(name, Recipe.of("auto", params=params), x)
    others = {"tied": {"base_rank": 0.5}, "lors": {"base_rank": 0.5}}
    for scheme, options in others.items():
        try:
            other = cost_of(name, Recipe.of(scheme, params=params, **options), x)
        except BudgetError:
            continue
        assert auto <= other * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("params", ["30%", "50%", "90%"])
def test_auto_costs_as_little_as_any_scheme_alone(params: str) -> None:
    x = images_of("timm-vit", 24)
    auto, _ = best_cost("timm-vit", Recipe.of("auto", params=params), x)
    for scheme in ("lowrank", "basis", "tied", "lors"):
        other, _ = best_cost("timm-vit", Recipe.of(scheme, params=params), x)
        assert auto <= other * (1 + 1e-6)


@pytest.mark.parametrize(
    "scheme", ["tied", *(pytest.param(s, marks=pytest.mark.slow) for s in ("auto", "lors"))]
)
def test_of_a_recipe_and_its_alternatives_the_cheapest_is_carried_out(scheme: str) -> None:
    name, x = "timm-vit", images_of("timm-vit", 24)
    recipe = Recipe.of(scheme, params="50%")
    _, best = best_cost(name, recipe, x)
    calib = calib_for(name, config=CalibConfig(effort="fast"))
    made = tiedconv.convert(MICROS[name].model(), recipe=recipe, calib=calib)
    assert state_of(made).history[0]["recipe"] == best.to_json()


@pytest.fixture
def _two_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiedconv.conversion.candidates.CLOSE", math.inf)


def kept_in(folder: Path, scheme: str = "lors", **options: Any) -> dict[str, Tensor]:
    """What a calibration that keeps what is done in a folder ends with."""
    calib = calib_for("timm-vit", run_dir=folder, **options)
    model = MICROS["timm-vit"].model()
    return dict(tiedconv.convert(model, scheme, params="60%", calib=calib).state_dict())


def interrupted_at(number: int, folder: Path) -> list[Path]:
    """Interrupt one before the blocks of this fit; what is kept, of files in the folder."""

    def interrupt(event: object) -> None:
        if isinstance(event, CandidateStarted) and event.number == number:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_in(folder, on_event=interrupt)
    return sorted(file.relative_to(folder) for file in RunDir(folder).kept())


FITS = [Path("0", FIT), Path("1", FIT)]


@pytest.mark.slow
@pytest.mark.usefixtures("_two_candidates")
def test_of_two_fits_the_second_is_gone_on_with(tmp_path: Path) -> None:
    whole = kept_in(tmp_path / "whole")
    cut = tmp_path / "cut"
    assert interrupted_at(2, cut) == [Path("0", CALIBRATION), *FITS]
    events: list[Any] = []
    resumed = kept_in(cut, resume=True, on_event=events.append)
    first = [
        e
        for e in events[: events.index(CandidateStarted(2, 2, ("lors",)))]
        if isinstance(e, Fitted)
    ]
    assert not first  # of the first fit no block was fitted again
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.slow
@pytest.mark.usefixtures("_two_candidates")
def test_what_was_measured_and_fitted_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = kept_in(tmp_path / "whole")
    cut = tmp_path / "cut"
    assert interrupted_at(1, cut) == FITS
    monkeypatch.setattr(Calibration, "measure", None)
    monkeypatch.setattr("tiedconv.conversion.candidates.fit_candidates", None)
    resumed = kept_in(cut, resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.slow
@pytest.mark.usefixtures("_two_candidates")
def test_a_fit_of_another_calibration_is_refused(tmp_path: Path) -> None:
    kept = interrupted_at(1, tmp_path)
    others: dict[str, dict[str, Any]] = {
        "recipe": {"scheme": "lowrank"},
        "seed": {"config": dataclasses.replace(QUICK, seed=1)},
        "images": {"data": Images(-images_of("timm-vit", 24))},
        "number of images": {"count": 5},
    }
    for what, options in others.items():
        with pytest.raises(UserError) as caught:
            kept_in(tmp_path, resume=True, **options)
        assert caught.value.code == "state-of-other-run"
        assert what in caught.value.what
    for name in kept:
        (tmp_path / name).rename(tmp_path / name.with_suffix(".away"))
    # Blocks of two fits, and no fits that would tell of what.
    (tmp_path / "0" / CALIBRATION).touch()
    (tmp_path / "1" / CALIBRATION).touch()
    with pytest.raises(UserError) as caught:
        kept_in(tmp_path, resume=True, config=CalibConfig(effort="fast"))
    assert caught.value.code == "state-of-other-run"
    assert (tmp_path / "0" / CALIBRATION).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_two_candidates")
def test_a_damaged_fit_is_refused_and_a_missing_one_made_again(tmp_path: Path) -> None:
    whole = kept_in(tmp_path / "whole")
    cut = tmp_path / "cut"
    interrupted_at(1, cut)
    good = (cut / FITS[0]).read_bytes()
    for at in (3, 40, len(good) // 2, len(good) - 1):
        (cut / FITS[0]).write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(CheckpointError) as caught:
            kept_in(cut, resume=True)
        assert caught.value.code == "state-damaged"
    (cut / FITS[0]).write_bytes(good)
    (cut / FITS[1]).unlink()  # as where a process was killed between the two
    resumed = kept_in(cut, resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


@pytest.mark.slow
def test_where_two_fits_are_near_each_other_it_is_reported_which_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiedconv.conversion.candidates.CLOSE", math.inf)
    events: list[Any] = []
    calib = calib_for("timm-vit", on_event=events.append)
    made = tiedconv.convert(MICROS["timm-vit"].model(), "lors", params="60%", calib=calib)
    reported = [e for e in events if isinstance(e, CandidateStarted | CandidateChosen)]
    assert reported[:2] == [CandidateStarted(1, 2, ("lors",)), CandidateStarted(2, 2, ("lors",))]
    kept = reported[2]
    assert isinstance(kept, CandidateChosen)
    after = state_of(made).history[0]["calibration"]["kl_after"]
    assert kept.divergences[kept.number - 1] == min(kept.divergences) == after
    lines: list[str] = []
    monkeypatch.setattr(ConvertBar, "line", lambda _, text: lines.append(text))
    for event in reported:
        ConvertBar(64)(event)
    assert lines[0] == "fit 1 of 2 (lors), block by block:"
    assert lines[2].startswith(f"kept fit {kept.number}: ")


@pytest.mark.parametrize("scheme", ["tied", "lors"])
def test_a_budget_that_needs_a_factored_base_is_met_with_images_too(scheme: str) -> None:
    name, params = "timm-vit", "35%"
    with pytest.raises(BudgetError):
        cost_of(name, Recipe.of(scheme, params=params), images_of(name, 4))
    budget = tiedconv.plan(MICROS[name].model(), scheme, params=params)
    made = tiedconv.convert(
        MICROS[name].model(), scheme, params=params,
        calib=calib_for(name, config=CalibConfig(effort="fast")),
    )  # fmt: skip
    assert budget.stored <= budget.original * 0.35
    assert state_of(made).plan.stored <= budget.original * 0.35
    assert state_of(made).history[0]["recipe"]["rules"][0]["base_rank"] == 0.5
    assert all(g.options["base_rank"] > 0 for g in state_of(made).plan.groups)


def test_a_budget_out_of_reach_is_refused_before_anything_is_measured() -> None:
    events: list[Any] = []
    calib = calib_for("timm-vit", on_event=events.append)
    model = MICROS["timm-vit"].model()
    with raises(BudgetError, "budget-too-small"):
        tiedconv.convert(model, "tied", params="2%", calib=calib)
    assert not events
    assert not is_tied(model)


@pytest.mark.slow
def test_a_conversion_in_place_by_images_changes_the_model_itself() -> None:
    given = MICROS["timm-vit"].model()
    made = tiedconv.convert(
        given, "lowrank", params="50%", calib=calib_for("timm-vit"), inplace=True
    )
    assert made is given
    apart = tiedconv.convert(
        MICROS["timm-vit"].model(), "lowrank", params="50%", calib=calib_for("timm-vit")
    )
    mine, other = made.state_dict(), apart.state_dict()
    assert all(torch.equal(mine[n], t) for n, t in other.items())


def test_without_a_budget_images_improve_the_fit_that_was_asked_for() -> None:
    name = "timm-vit"
    fresh = images_of(name, 60)[24:]
    blind = tiedconv.convert(MICROS[name].model(), "tied")
    made = tiedconv.convert(MICROS[name].model(), "tied", calib=calib_for(name))
    assert state_of(made).plan.stored == state_of(blind).plan.stored
    assert dict(state_of(made).plan.weights) == dict(state_of(blind).plan.weights)
    assert divergence(made, name, fresh) < 0.6 * divergence(blind, name, fresh)
