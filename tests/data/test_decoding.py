"""From image files to a model's channels: bits, fractions, orientation, grey and transparency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import World, figures, run
from error_codes import raises
from PIL import Image

from tiedconv.data import ImageList, eval_transform, open_images
from tiedconv.data.decoding import decode
from tiedconv.detection import DetectionList
from tiedconv.errors import DataError, PlanError
from tiedconv.io.checkpoint_reader import read
from tiedconv.numerics.linalg import cholesky
from tiedconv.sources import Preprocess, describe

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        ((RAMP * 255).astype(np.uint8), "png"),
        ((RAMP * 4095).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "png"),
        ((RAMP * 65535).astype(np.uint16), "tif"),
        ((RAMP * 255).astype(np.int32), "tif"),
        ((RAMP * 1e6).astype(np.int32), "tif"),
        ((RAMP * 2e6 - 1e6).astype(np.int32), "tif"),
        (RAMP.astype(np.float32), "tif"),
        ((RAMP * 255).astype(np.float32), "tif"),
        ((RAMP * 2000).astype(np.float32), "tif"),
        ((RAMP * 2 - 1).astype(np.float32), "tif"),
    ],
)
def test_numbers_of_any_width_become_the_same_picture(
    tmp_path: Path, values: np.ndarray[Any, Any], ending: str
) -> None:
    path = tmp_path / f"x.{ending}"
    Image.fromarray(values).save(path)
    found = np.asarray(decode(path)).astype(int)
    assert found.shape == (48, 64, 3)
    assert np.abs(found[..., 0] - RAMP * 255).max() <= 1.5


def test_a_dark_picture_of_16_bits_is_not_made_brighter_than_12_bits(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2047, np.uint16)).save(tmp_path / "x.png")
    assert int(np.asarray(decode(tmp_path / "x.png"))[0, 0, 0]) == 127


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_get_the_models_channels(tmp_path: Path, channels: int, mode: str) -> None:
    for name in ("L", "LA", "P", "RGB", "RGBA", "CMYK"):
        path = tmp_path / f"{name}.{'jpg' if name == 'CMYK' else 'png'}"
        Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").convert(name).save(path)
        assert decode(path, channels).mode == mode
    (tmp_path / "d" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "d" / "a" / "0.png")
    images = open_images(tmp_path / "d")
    prepared = Preprocess(8).for_channels(channels)
    shown, _ = ImageList(images, eval_transform(prepared), channels=channels)[0]
    assert shown.shape == (channels, 8, 8)
    with raises(DataError, "channels-unsupported", "5 channels"):
        ImageList(images, eval_transform(prepared), channels=5)


def turned(path: Path, size: tuple[int, int] = (96, 48)) -> Path:
    image = Image.new("RGB", size)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    return path


def test_orientation_is_applied_where_it_is_asked_for(tmp_path: Path) -> None:
    path = turned(tmp_path / "a.jpg")
    assert decode(path).size == (96, 48)
    assert decode(path, exif=True).size == (48, 96)
    assert decode(path, size=(48, 96)).size == (48, 96)
    assert decode(path, size=(96, 48), exif=True).size == (96, 48)


@pytest.mark.parametrize("frame", [(48, 96), (96, 48)])
def test_a_photo_lies_as_its_boxes_do(tmp_path: Path, frame: tuple[int, int]) -> None:
    for part in ("annotations", "val2017"):
        (tmp_path / part).mkdir()
    turned(tmp_path / "val2017" / "a.jpg")
    width, height = frame
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 30, 30],
                         "area": 900, "iscrowd": 0}],
    }  # fmt: skip
    path = tmp_path / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(data))
    listed = DetectionList(open_images(path), Preprocess(32, None))
    assert listed._decoded(0).size == frame


def test_exif_is_an_option_and_recorded(world: World, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    source = read(world.tied).source
    assert source is not None
    arguments = [x for k, v in source["kwargs"].items() for x in ("--model-arg", f"{k}={v}")]
    run("convert", source["spec"], *arguments, "--weights", world.weights, "--exif", "-o", output)
    written = read(output).source
    assert written is not None
    assert written["preprocess"]["exif"] is True
    assert "exif" not in source["preprocess"]
    assert Preprocess.from_json(written["preprocess"]).exif
    assert figures("evaluate", output, "--data", world.data)["preprocess"]["exif"] is True
    done = figures("evaluate", output, "--data", world.data, "--no-exif")
    assert done["preprocess"]["exif"] is False
    with raises(PlanError, "invalid-exif"):
        Preprocess.from_json({**written["preprocess"], "exif": 1})


@pytest.mark.parametrize("channels", [1, 4])
def test_models_of_other_channels_are_evaluated_and_calibrated(
    tmp_path: Path, channels: int
) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (40, 40), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / name / f"{i}.png")
    arguments = ["--model-arg", f"in_chans={channels}", "--model-arg", "num_classes=2"]
    output, quick = tmp_path / "c.safetensors", ["--workers", "0"]
    words = ("convert", "timm:test_vit", "--weights", "none", *arguments, "-o", output)
    run(*words, "--scheme", "lowrank", "--params", "90%", "--calib", tmp_path / "d",
        "--effort", "fast", *quick)  # fmt: skip
    assert len(figures("evaluate", output, "--data", tmp_path / "d", *quick)["preprocess"]["mean"]
               ) == channels  # fmt: skip
    run("verify", output)


def test_preprocessing_follows_the_channels() -> None:
    own = Preprocess(8, None, (0.1, 0.2, 0.3), (0.2, 0.4, 0.6))
    assert own.for_channels(3) is own
    grey = own.for_channels(1)
    assert grey.mean == pytest.approx((0.2,))
    assert grey.std == pytest.approx((0.4,))
    assert own.for_channels(4).mean == pytest.approx((0.1, 0.2, 0.3, 0.2))
    assert own.for_channels(2).mean == (0.1, 0.2)
    _, source = describe("timm:test_vit", {"in_chans": 1})
    assert source.preprocess is not None
    assert source.preprocess.channel_count() == 1


def test_a_singular_moment_has_a_root() -> None:
    a = torch.randn(6, 40, dtype=torch.float64)
    a[:, ::4] = 1.0  # a constant channel
    moment = (a.t() @ a / 6).float()
    root = cholesky(moment)
    assert torch.allclose(root @ root.t(), moment.double(), atol=2e-3 * float(moment.max()))
    assert torch.equal(root, root.tril())
    exact = cholesky(torch.eye(3))
    assert torch.equal(exact, torch.eye(3, dtype=torch.float64))
    with pytest.raises(torch.linalg.LinAlgError):
        cholesky(-torch.eye(3))


def test_links_in_circles_list_each_image_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "d" / name / "deep").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "d" / name / "deep" / "0.png")
    (tmp_path / "d" / "a" / "loop").symlink_to(tmp_path / "d" / "a")
    (tmp_path / "d" / "a" / "deep" / "up").symlink_to(tmp_path / "d")
    images = open_images(tmp_path / "d")
    names = [Path(images.name(i)).resolve() for i in range(len(images))]
    labels = [images.label(i) for i in range(len(images))]
    assert names.count(tmp_path / "d" / "a" / "deep" / "0.png") == 1
    assert labels.count(1) == 1
