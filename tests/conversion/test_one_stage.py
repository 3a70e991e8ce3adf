"""The whole chain on a detector of YOLO's shape, whose maps have no names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import figures, run
from one_stage import one_stage
from PIL import Image

import tiedconv
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.coverage import coverage

HERE = str(Path(__file__).parents[1] / "helpers")
SPEC = "one_stage:one_stage"
PREPARED = ["--image-size", 64, "--resize", 0, "--mean", "0,0,0", "--std", "1,1,1"]
QUIET = ["--workers", 0, "--device", "cpu"]


@pytest.fixture(autouse=True)
def helpers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth random images: rectangles of one colour on another."""
    folder, draws = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(24):
        pixels = np.full((64, 64, 3), draws.integers(0, 255, 3), np.uint8)
        top, left = draws.integers(0, 40, 2)
        pixels[top : top + 24, left : left + 24] = draws.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def test_its_bottlenecks_are_found_and_nearly_all_is_covered() -> None:
    info = inspect_model(one_stage())
    found = {(block.name, *sorted(block.slots)) for family, block in info.blocks}
    for place in ("backbone.2.m.0", "backbone.2.m.1", "backbone.4.m.1"):
        assert (place, "cv1.conv.weight", "cv2.conv.weight") in found
    slots = [slot for _, block in info.blocks for slot in block.slots.values()]
    assert coverage(info, slots).share > 0.97


@pytest.mark.parametrize("scheme", ["lors", "basis", "shared", "lowrank"])
def test_schemes_convert_it(scheme: str) -> None:
    tied = tiedconv.convert(one_stage(), scheme)
    plan = tiedconv.runtime.tie.state_of(tied).plan
    assert plan.stored < 0.85 * plan.original


@pytest.mark.slow
def test_it_is_calibrated_distilled_verified_and_exported(photos: Path, tmp_path: Path) -> None:
    file, tuned = tmp_path / "y.safetensors", tmp_path / "t.safetensors"
    made = figures("convert", SPEC, "-o", file, "--scheme", "auto", "--bytes", "12%",
                   "--calib", photos, "--effort", "fast", *PREPARED, *QUIET)  # fmt: skip
    said = made["calibration"]["agreement"]
    assert said["compares"] == "cosine of the features"
    assert said["mean"] > 0.9
    done = figures("finetune", file, "--data", photos, "-o", tuned, "--distill", 1, "--teacher",
                   SPEC, "--steps", 6, "--batch-size", 8, "--trust-code", "--no-picture",
                   *QUIET)  # fmt: skip
    change: Any = done["result"]
    assert change["metrics"]["similarity"] >= change["metrics_before"]["similarity"] - 1e-6
    onnx = tmp_path / "y.onnx"
    assert figures("export", tuned, "-o", onnx, "--trust-code")["difference"] < 1e-4
    run("verify", tuned, "--original", SPEC, "--against", onnx, "--trust-code")


@pytest.mark.slow
def test_only_some_of_its_maps_can_be_compared(photos: Path, tmp_path: Path) -> None:
    options = ["--scheme", "lowrank", "--params", "60%", "--calib", photos, "--effort", "fast",
               *PREPARED, *QUIET]  # fmt: skip
    whole, some = (
        figures("convert", SPEC, "-o", tmp_path / f"{i}.safetensors", *options, *chosen)
        for i, chosen in enumerate(([], ["--output-name", "0,2"]))
    )
    means = [made["calibration"]["agreement"]["mean"] for made in (whole, some)]
    assert means[0] != pytest.approx(means[1], abs=1e-9)
    assert min(means) > 0.8


def test_the_maps_have_three_scales() -> None:
    with torch.no_grad():
        maps = one_stage()(torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 9, 8, 8), (2, 9, 4, 4), (2, 9, 2, 2)]
