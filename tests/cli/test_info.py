"""`info` and `list`; sizes as numbers, `transform`, and a DataLoader in Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cli_helpers import MODEL_ARGS, SPEC, World, figures, plain, refused, run
from error_codes import raises
from micro import all_micros
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import tiedconv
from tiedconv.cli import app
from tiedconv.errors import RecipeError, UserError
from tiedconv.families import all_families
from tiedconv.runtime.tie import state_of
from tiedconv.schemes import all_schemes
from tiedconv.tasks import all_tasks


def test_info_tells_versions_extras_and_devices() -> None:
    found = figures("info")
    assert found["versions"]["tiedconv"] == tiedconv.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["extras"]["onnx"]["onnxruntime"]
    assert set(found["extras"]) >= {"timm", "hf", "onnx", "detection"}
    assert "dev" not in found["extras"]
    shown = plain(run("info").output)
    for version in (tiedconv.__version__, str(torch.__version__)):
        assert version in shown


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("schemes", lambda: list(all_schemes())),
        ("families", lambda: [family.name for family in all_families()]),
        ("tasks", lambda: list(all_tasks())),
    ],
)
def test_lists_name_what_there_is(what: str, names: Any) -> None:
    assert sorted(figures("list", what)) == sorted(names())


def test_models_are_listed_by_a_pattern() -> None:
    found = figures("list", "models", "vit_b_*")
    assert "vit_b_16" in found
    assert all("vit_b_" in name for name in found)
    only = figures("list", "models", "timm:vit_tiny*")
    assert only
    assert all(name.startswith("timm:vit_tiny") for name in only)
    refused("list", "colours", error_code="unknown-list")


@pytest.mark.parametrize(
    ("given", "text"), [(0.5, "50%"), (0.125, "12.5%"), ("50%", "50%"), (20_000, "20000")]
)
def test_a_size_is_a_fraction_a_number_or_a_text(given: Any, text: str) -> None:
    plan = tiedconv.plan(all_micros()["timm-vit"].model(), "lowrank", params=given)
    assert plan == tiedconv.plan(all_micros()["timm-vit"].model(), "lowrank", params=text)


@pytest.mark.parametrize("given", [0, 1.5, -0.1, True, float("nan")])
def test_other_numbers_are_no_sizes(given: Any) -> None:
    with raises(RecipeError, "budget-invalid"):
        tiedconv.plan(all_micros()["timm-vit"].model(), "lowrank", params=given)


def test_bytes_are_a_size_too() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "auto", bytes=0.4)
    assert state_of(model).history[-1]["recipe"]["bytes"] == "40%"


def test_a_loader_stands_for_its_images() -> None:
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.zeros(12, dtype=torch.int64))
    one, other = (
        tiedconv.convert(
            all_micros()["timm-vit"].model(), "lowrank", params=0.6,
            calib=tiedconv.Calibration(
                given, config=tiedconv.CalibConfig(effort="fast"), workers=0
            ),
        )
        for given in (data, DataLoader(data, batch_size=4))
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_transform_prepares_images_as_the_model_wants_them(world: World) -> None:
    image = Image.new("RGB", (50, 40), (255, 0, 0))
    of_file = tiedconv.transform(world.tied)
    of_model = tiedconv.transform(tiedconv.load(world.tied))
    of_spec = tiedconv.transform(SPEC, model_args={"img_size": 32})
    assert of_file == of_model
    assert of_file(image).shape == (3, 32, 32)
    assert of_spec(image).shape == (3, 32, 32)
    assert MODEL_ARGS


def test_a_model_of_ones_own_has_no_transform() -> None:
    with raises(UserError, "preprocess-unknown"):
        tiedconv.transform(nn.Linear(4, 4))


def test_a_plan_and_a_report_are_shown_as_tables(world: World) -> None:
    plan, report = tiedconv.plan("resnet50", "tied"), tiedconv.report(world.tied)
    for found, last in ((plan, f"{plan.stored:,}"), (report, f"{report.tensor_bytes:,}")):
        lines = str(found).splitlines()
        assert lines[1].split()[:2] == ["group", "scheme"]
        assert lines[-1].startswith("whole model")
        assert last in lines[-1]
        assert len(lines[1]) == len(lines[-1])  # right-aligned
        assert found._repr_html_().count("<tr>") == len(lines) - 1
    rows = plan.table().rows
    assert sum(int(row[3].replace(",", "")) for row in rows[:-1]) == plan.stored
    assert "<script>" not in tiedconv.core.tables.Table("<script>", ("a",), (("<b>",),)).html()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("convert m --scheme lo", {"lors", "lors-adaptive", "lowrank"}),
        ("convert m --calib d --effort t", {"thorough"}),
        ("evaluate m --data d --task s", {"segmentation"}),
        ("export f -o g --to o", {"onnx", "openvino"}),
        ("list sch", {"schemes"}),
    ],
)
def test_choices_are_completed(words: str, found: set[str]) -> None:
    said = CliRunner().invoke(
        app, [], prog_name="tiedconv",
        env={"_TIEDCONV_COMPLETE": "complete_bash", "COMP_WORDS": f"tiedconv {words}",
             "COMP_CWORD": str(len(words.split()))},
    ).output  # fmt: skip
    assert set(said.split()) == found
