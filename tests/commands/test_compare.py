"""`plan`: sizes as `convert --dry-run` tells them, costs as the metric of images gives them."""

from __future__ import annotations

import copy
import gc
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import MODEL_ARGS, SPEC, World, figures, plain, refused, run, write_images
from error_codes import raises
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.calibration import CalibConfig, gather_statistics
from tiedconv.calibration.held_out import split
from tiedconv.commands.compare import Comparison, compare
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.cost_estimate import Sizes
from tiedconv.data import Subset, TensorList
from tiedconv.errors import NothingToConvert, RecipeError, UserError
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.budget import Budget
from tiedconv.planning.byte_budget import ByteBudget, byte_outlines
from tiedconv.planning.planner import outline
from tiedconv.planning.recipe import Recipe
from tiedconv.schemes import all_schemes

FAST = CalibConfig(effort="fast")
HERE = ["--workers", "0", "--device", "cpu"]


def images(side: int = 16, count: int = 8) -> TensorList:
    pixels = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))
    return TensorList(pixels, torch.zeros(count, dtype=torch.int64))


def calibration(side: int = 16, count: int = 8) -> Calibration:
    return Calibration(images(side, count), count, FAST, "cpu", 0)


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return all_micros()["timm-vit"].model()


@dataclass(frozen=True)
class Work:
    """A comparison with costs, and what was done for it: models measured, fits announced."""

    found: Comparison
    measured: list[Tensor]
    fits: list[str]


@pytest.fixture(scope="module")
def work(vit: nn.Module) -> Work:
    measured: list[Tensor] = []
    fits: list[str] = []
    measure = Calibration.measure

    def counted(
        self: Calibration, model: nn.Module, weights: Any, data: Any, moved: dict[str, Tensor]
    ) -> Any:  # fmt: skip
        tensors = {**model.state_dict(), **moved}.values()
        measured.append(torch.cat([t.detach().flatten() for t in tensors]))
        return measure(self, model, weights, data, moved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Calibration, "measure", counted)
        found = compare(
            vit, ["60%", "25%"], calib=calibration(), on_fit=lambda i, n, what: fits.append(what)
        )
    return Work(found, measured, fits)


@pytest.fixture(scope="module")
def priced(work: Work) -> Comparison:
    return work.found


# Sizes


@pytest.mark.slow
def test_sizes_are_those_of_a_dry_run() -> None:
    found = figures("plan", SPEC, *MODEL_ARGS, "--params", "80%,50%,25%,9000")
    assert found["budgets"] == ["80%", "50%", "25%", "9000"]
    met = missed = 0
    for row in found["rows"]:
        for cell in row["cells"]:
            asked = ("convert", SPEC, *MODEL_ARGS, *row["spec"]["flags"], "--dry-run",
                     "--params", cell["budget"])  # fmt: skip
            if cell["stored"] is None:
                refused(*asked, error_code="budget-too-small")
                missed += 1
            else:
                assert figures(*asked)["stored"] == cell["stored"], (row["spec"], cell)
                assert cell["share"] == pytest.approx(cell["stored"] / found["original"])
                assert cell["stored"] >= row["smallest"]
                met += 1
    assert met >= 10
    assert missed >= 1
    for fixed in found["fixed"]:
        asked = ("convert", SPEC, *MODEL_ARGS, *fixed["spec"]["flags"], "--dry-run")
        assert figures(*asked)["stored"] == fixed["stored"], fixed["spec"]


def test_the_smallest_size_is_the_one_that_an_error_names() -> None:
    rows = figures("plan", SPEC, *MODEL_ARGS, "--params", "2500")["rows"]
    smallest = {row["spec"]["name"]: row["smallest"] for row in rows}
    for scheme in ("lowrank", "basis"):
        refused(
            "convert", SPEC, *MODEL_ARGS, "--scheme", scheme, "--params", 2500, "--dry-run",
            error_code="budget-too-small", words=[f"{smallest[scheme]:,} "],
        )  # fmt: skip


def test_every_scheme_is_compared(vit: nn.Module) -> None:
    found = compare(vit)
    assert found.budgets == ("70%", "50%", "30%")
    names = {row.spec.scheme for row in found.rows} | {f.spec.scheme for f in found.fixed}
    assert names | set(found.unfit) == set(all_schemes())
    assert found.images is None
    assert {"tied", "tied groups=all", "shared"} <= {f.spec.name for f in found.fixed}
    sizes = [(f.spec.scheme, f.stored) for f in found.fixed]
    assert len(set(sizes)) == len(sizes)


# Bytes


def test_bits_at_a_budget_of_bytes(vit: nn.Module) -> None:
    found = compare(vit, [], bytes=["60%", "40%"])
    assert found.budgets == ()
    info = inspect_model(vit)
    assert {c.bytes for c in found.byte_cells} == {
        int(4 * found.original * share) for share in (0.6, 0.4)
    }
    whole = {c.budget: c for c in found.byte_cells if c.params == "100%"}
    assert set(whole) == {"60%", "40%"}
    for cell in found.byte_cells:
        tried = byte_outlines(
            info, Recipe.of("auto", bytes=cell.budget), ByteBudget(cell.bytes, 4 * found.original)
        )
        shares = {o.recipe.budget.text if o.recipe.budget else "100%" for o in tried}
        assert shares == {c.params for c in found.byte_cells if c.budget == cell.budget}
        assert (cell.cost, cell.scheme, cell.best) == (None, None, False)
        # What a file says of itself takes its part.
        assert 0 < cell.bits < 8 * cell.bytes / cell.stored


def test_images_tell_what_rounding_costs(vit: nn.Module) -> None:
    found = compare(vit, [], bytes=["60%", "25%"], calib=calibration())
    for budget in ("60%", "25%"):
        cells = [c for c in found.byte_cells if c.budget == budget]
        costs = [c.cost for c in cells if c.cost is not None]
        assert len(costs) == len(cells)
        assert [c.cost for c in cells if c.best] == [min(costs)]
    whole = {c.budget: c.cost for c in found.byte_cells if c.params == "100%"}
    assert whole["60%"] is not None
    assert whole["25%"] is not None
    assert whole["60%"] < whole["25%"]


def test_budgets_of_bytes_on_the_command_line() -> None:
    command = ("plan", SPEC, *MODEL_ARGS, "--weights", "none", "--bytes")
    cells = figures(*command, "60%,9kB")["byte_cells"]
    assert {c["budget"] for c in cells} == {"60%", "9kB"}
    result = run(*command, "60%")
    assert "whole model" in plain(result.stdout)
    assert "--bytes 60% --calib IMAGES" in plain(result.stderr)
    refused(*command, "9 pounds", error_code="invalid-bytes")
    refused(*command, "100%", error_code="budget-saves-nothing")


def test_small_budgets_are_met_by_an_alternative(vit: nn.Module) -> None:
    row = next(r for r in compare(vit, ["30%"]).rows if r.spec.name == "lors")
    assert row.cells[0].how is not None
    assert row.cells[0].how.name == "lors base_rank=0.5"


def test_a_scheme_that_finds_nothing_is_named() -> None:
    found = compare(all_micros()["perceptron"].model(), ["80%"])
    assert "tied" in found.unfit
    assert {row.spec.scheme for row in found.rows} >= {"lowrank", "lors"}


def test_a_model_in_which_nothing_is_found() -> None:
    with pytest.raises(NothingToConvert):
        compare(nn.Linear(3, 4))


# Costs


@pytest.mark.slow
def test_every_cell_that_can_be_has_a_cost_and_the_lowest_is_marked(priced: Comparison) -> None:
    assert priced.images == 8
    for i in range(len(priced.budgets)):
        column = [row.cells[i] for row in priced.rows if row.cells[i].stored is not None]
        costs = [cell.cost for cell in column if cell.cost is not None]
        assert len(costs) == len(column) > 1
        # Two schemes may try the same thing, and then both are marked.
        assert {c.cost for c in column if c.best} == {min(costs)}
    assert all(f.cost is not None and f.cost > 0 for f in priced.fixed)


@pytest.mark.slow
def test_less_room_costs_more(priced: Comparison) -> None:
    for row in priced.rows:
        costs = [cell.cost for cell in row.cells if cell.cost is not None]
        assert costs == sorted(costs)


def test_a_cost_is_what_the_metric_says_of_the_converted_weights(
    vit: nn.Module, priced: Comparison
) -> None:
    row = next(r for r in priced.rows if r.spec.name == "lowrank")
    made = tiedconv.convert(vit, "lowrank", params="60%", calib=calibration())
    assert sum(p.numel() for p in made.parameters()) == row.cells[0].stored
    before, after = vit.state_dict(), tiedconv.untie(made).state_dict()
    names = {n: False for n, t in before.items() if n.endswith("weight") and t.dim() > 1}
    data = images()
    measured = Subset(data, split(len(data), 0)[0])
    statistics = gather_statistics(copy.deepcopy(vit), names, measured, device="cpu", workers=0)
    total = sum(statistics.metrics[n].cost((before[n] - after[n]).flatten(1)) for n in names)
    assert row.cells[0].cost == pytest.approx(total, rel=1e-3)


def test_statistics_are_measured_once_for_each_alignment(work: Work, vit: nn.Module) -> None:
    info = inspect_model(vit)
    specs = [row.spec.recipe(Budget(cell.budget)) for row in work.found.rows for cell in row.cells]
    feasible = [r for recipe in specs for r in Sizes(info).feasible(recipe)]
    recipes = [*feasible, *(f.spec.recipe() for f in work.found.fixed)]
    alignments = {outline(info, recipe).alignment for recipe in recipes}
    assert len(work.measured) == len(alignments)
    assert len(work.fits) == len(set(work.fits)) > 2 * len(work.measured)


def test_the_model_is_left_as_it_was(vit: nn.Module, priced: Comparison) -> None:
    fresh = all_micros()["timm-vit"].model().state_dict()
    assert all(torch.equal(t, fresh[n]) for n, t in vit.state_dict().items())


@pytest.mark.slow
def test_a_convolutional_model_has_costs_too() -> None:
    found = compare(
        all_micros()["torchvision-resnet"].model(), ["60%"], calib=calibration(32, 2)
    )  # fmt: skip
    assert any(row.cells[0].best for row in found.rows)


# The command


def test_what_is_printed(world: World) -> None:
    result = run("plan", SPEC, *MODEL_ARGS, "--params", "60%, 20%")
    text = plain(result.stdout)
    assert text.splitlines()[1].split() == ["scheme", "60%", "20%"]
    assert "– from" in text
    assert "of fixed size" in text
    assert "lors at 60%, 20%: as lors base_rank=0.5, chosen automatically." in text
    assert "of the parameters can be converted" in text
    assert "--scheme auto --params" in result.stderr
    assert f"tiedconv plan {SPEC}" in result.stderr
    assert gc.isenabled()


@pytest.mark.slow
def test_a_broken_image_is_left_out_and_reported(world: World, tmp_path: Path) -> None:
    write_images(tmp_path)
    images = sorted((tmp_path / "train").rglob("*.png"))
    images[0].write_bytes(b"no image")
    command = ("plan", SPEC, *MODEL_ARGS, "--params", "60%", "--calib", tmp_path, "-n", 100,
               "--weights", world.weights, *HERE)  # fmt: skip
    text = plain(run(*command).stdout)
    assert f"from {len(images) - 1} images" in text
    assert "1 image could not be read and was skipped." in text
    refused(*command, "--strict", words=["0.png"], error_code="image-unreadable")


@pytest.mark.slow
def test_the_next_command_runs(world: World, tmp_path: Path) -> None:
    said = run(
        "plan", SPEC, *MODEL_ARGS, "--params", "60%", "--calib", world.data, "-n", 6, "--seed", 1,
        "--weights", world.weights, "--mean", "0.5", "--std", "0.5", "--resize", 0, *HERE,
    )  # fmt: skip
    assert " *" in said.stdout
    assert "from 6 images" in said.stdout
    command = said.stderr.strip().removeprefix("Next: tiedconv ")
    assert "--mean 0.5 --std 0.5" in command.replace("'", "")
    run(
        *shlex.split(command),
        "-o",
        tmp_path / "out.safetensors",
        "--effort",
        "fast",
        *HERE,
        "-n",
        6,
    )


@pytest.mark.slow
def test_figures_with_costs(world: World) -> None:
    found = figures(
        "plan", SPEC, *MODEL_ARGS, "--params", "60%", "--calib", world.data, "-n", 6,
        "--weights", world.weights, *HERE,
    )  # fmt: skip
    assert found["images"] == 6
    cells = [row["cells"][0] for row in found["rows"] if row["cells"][0]["stored"]]
    least = min(cell["cost"] for cell in cells)
    assert [c["best"] for c in cells] == [c["cost"] == least for c in cells]
    assert all(cell["cost"] > 0 for cell in cells)


# Refusals


def test_mistakes_are_reported_in_one_line(world: World, tmp_path: Path) -> None:
    refused("plan", "resnet5000", error_code="unknown-model", words=["resnet5000"])
    refused(
        "plan",
        SPEC,
        *MODEL_ARGS,
        "--params",
        "50%,half",
        error_code="budget-invalid",
        words=["'half'", "50%"],
    )
    refused(
        "plan",
        SPEC,
        *MODEL_ARGS,
        "--params",
        " , ",
        error_code="budget-missing",
        words=["70%,50%,30%"],
    )
    refused(
        "plan",
        SPEC,
        *MODEL_ARGS,
        "--params",
        "12,000",
        error_code="budget-without-percent",
        words=["'12'", "12%"],
    )
    refused("plan", world.tied, error_code="already-compact")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, code in ((empty, "no-images"), (tmp_path / "missing", "no-data-folder")):
        refused(
            "plan", SPEC, *MODEL_ARGS, "--weights", "none", "--calib", folder,
            error_code=code, words=[folder.name],
        )  # fmt: skip


def test_mistakes_in_python(vit: nn.Module) -> None:
    with raises(RecipeError, "budget-missing"):
        compare(vit, [])
    with raises(UserError, "already-tied"):
        compare(tiedconv.convert(vit, "tied"))
