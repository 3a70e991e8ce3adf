"""Images that are drawn at random: the same ones each time, which stand in for photos."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from cli_helpers import MODEL_ARGS, World, run
from error_codes import raises
from hypothesis import given
from hypothesis import strategies as st
from micro import all_micros
from PIL import Image

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.commands.measured import Measured, measured
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import open_images, open_split, open_unlabelled, random_shapes
from tiedconv.errors import DataError
from tiedconv.runtime.tie import state_of
from tiedconv.sources import Preprocess, Source


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.integers(0, 9)
)
def test_they_are_pixels_and_decided_by_the_seed(
    count: int, channels: int, height: int, width: int, seed: int
) -> None:
    found = random_shapes(count, (height, width), channels, seed=seed)
    assert found.shape == (count, channels, height, width)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(found, random_shapes(count, (height, width), channels, seed=seed))
    assert not torch.equal(found, random_shapes(count, (height, width), channels, seed=seed + 1))


def test_they_have_the_brightness_of_photos_and_edges() -> None:
    found = random_shapes(128, (32, 32))
    assert abs(float(found.mean()) - 0.46) < 0.03
    assert 0.2 < float(found.std()) < 0.3
    steps = (found[..., 1:] - found[..., :-1]).abs()
    assert float(steps.median()) < 0.02 < 0.2 < float(steps.quantile(0.97))


def test_the_layout_gives_each_image_by_its_number() -> None:
    some = open_unlabelled("random", count=6)
    assert len(some) == 6
    assert some.labels is None
    files = [some.open(i) for i in range(6)]
    assert all(isinstance(file, io.BytesIO) for file in files)
    sizes = {Image.open(file).size for file in files}  # type: ignore[arg-type]
    assert sizes == {(224, 224)}
    small = open_unlabelled("random:9", count=2).open(0)
    assert Image.open(small).size == (9, 9)  # type: ignore[arg-type]
    assert some.digest() == open_unlabelled("random", count=6).digest()
    assert some.digest() != open_unlabelled("random", count=6, seed=1).digest()
    split = open_split("random", labels="ignore")
    assert not set(split.train.places) & set(split.val.places)


def test_they_are_drawn_at_the_size_that_a_model_takes() -> None:
    wanted = Source("", preprocess=Preprocess(12, 16, (0.0,) * 3, (1.0,) * 3))
    data = Calibration("random", 3).open(wanted)
    drawn = random_shapes(1, (16, 16), seed=int(open_unlabelled("random", count=3).places[0]))
    assert torch.allclose(data[0][0], drawn[0, :, 2:14, 2:14], atol=1 / 255)


def test_they_have_no_labels_to_evaluate_by() -> None:
    with raises(DataError, "no-labels"):
        open_images("random")


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_a_model_is_calibrated_on_them(effort: str) -> None:
    micro = all_micros()["timm-vit"]
    calib = Calibration("random", 16, CalibConfig(effort=effort, steps=2), workers=0)
    tied = tiedconv.convert(micro.model(), "auto", bytes="20%", calib=calib)
    record = state_of(tied).history[-1]["calibration"]
    assert record["images"] == 16
    assert record["ridge_median"] >= 0.3
    assert record["random"] is True


def test_the_command_says_that_no_photo_was_seen(world: World, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    options = ("--calib-images", 16, "--effort", "fast", "--workers", 0)
    model = ("timm:vit_tiny_patch16_224", *MODEL_ARGS, "--weights", world.weights)
    done = run("convert", *model, "--bytes", "30%", "--calib", "random", *options, "-o", file)
    assert "No photo was seen" in " ".join(done.stderr.split())
    found = measured(tiedconv.report(file).history)
    assert [each.random for each in found] == [True]
    assert "held-out random image" in found[0].sentence
    # It is not compared with what was measured on photos.
    photos = Measured(1, found[0].title, found[0].title, 1.0, True, 2)
    assert found[0].kind != photos.kind
