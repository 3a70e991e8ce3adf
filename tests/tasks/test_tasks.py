"""What models are evaluated at: classes of pixels, a vote of the nearest, classes by embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import figures, plain, refused, run
from detection_helpers import write_coco
from error_codes import raises
from PIL import Image
from safetensors.torch import save_file
from task_helpers import SIDE, write_colours, write_masks
from torch import Tensor
from towers import clip

import tiedconv
from tiedconv.commands.evaluate import evaluate
from tiedconv.data import open_images, open_unlabelled
from tiedconv.errors import UserError
from tiedconv.tasks import all_tasks, task_of
from tiedconv.tasks._base import features_of

HERE = str(Path(__file__).parents[1] / "helpers")
SEGMENTER, EMBEDDER = "task_helpers:segmenter", "task_helpers:embedder"
PREPARED = ["--image-size", SIDE, "--resize", 0, "--mean", "0,0,0", "--std", "1,1,1"]
QUIET = ["--workers", 0, "--device", "cpu"]


@pytest.fixture(autouse=True)
def helpers_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("masks"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("colours"))


def measured(spec: str, data: Path, *options: Any) -> dict[str, float]:
    found = figures("evaluate", spec, "--data", data, *PREPARED, *QUIET, *options)
    metrics: dict[str, float] = found["result"]["metrics"]
    return metrics


def test_data_mean_one_task(tmp_path: Path, masks: Path, colours: Path) -> None:
    coco = write_coco(tmp_path / "coco")
    for data, name in ((masks, "segmentation"), (colours, "classification"), (coco, "detection")):
        images = open_images(data)
        fitting = [t.name for t in all_tasks().values() if t.by_default and t.fits(images)]
        assert fitting == [name]
        assert task_of("auto", images).name == name


def test_every_task_has_titles_for_its_metrics(masks: Path) -> None:
    for task in all_tasks().values():
        assert task.columns
        assert task.needs


# Segmentation


def test_a_right_segmenter_has_a_mean_iou_of_one(masks: Path) -> None:
    assert measured(SEGMENTER, masks) == {"miou": 1.0, "pixel_accuracy": 1.0}


@pytest.mark.parametrize("wrong", [1, 3])
def test_mean_iou_is_that_of_all_pixels_together(wrong: int, tmp_path: Path) -> None:
    data = write_masks(tmp_path / "m", wrong=wrong)
    found = measured(SEGMENTER, data)
    table = np.zeros((3, 3))
    for i in range(4):
        said = (np.arange(SIDE) // 4 + i) % 3
        true = said.copy()
        true[-wrong:] = (true[-wrong:] + 1) % 3
        np.add.at(table, (true, said), 1)
    union = table.sum(0) + table.sum(1) - table.diagonal()
    assert found["miou"] == pytest.approx((table.diagonal() / union).mean(), abs=1e-9)
    assert found["pixel_accuracy"] == pytest.approx(1 - wrong / SIDE, abs=1e-9)


def test_a_class_that_does_not_occur_does_not_count(tmp_path: Path) -> None:
    data = write_masks(tmp_path / "m")
    for file in (data / "annotations" / "validation").glob("*.png"):
        mask = np.asarray(Image.open(file)).copy()
        mask[mask == 2] = 255
        Image.fromarray(mask).save(file)
    assert measured(SEGMENTER, data) == {"miou": 1.0, "pixel_accuracy": 1.0}


def test_masks_that_begin_at_one(tmp_path: Path) -> None:
    data = write_masks(tmp_path / "m", first_class=1)
    refused("evaluate", SEGMENTER, "--data", data, *PREPARED, *QUIET, error_code="classes-mismatch")
    assert measured(SEGMENTER, data, "--first-class", 1)["miou"] == 1.0


def test_folders_as_pascal_has_them_and_without_parts(tmp_path: Path) -> None:
    data = write_masks(tmp_path / "m", parts=False)
    assert measured(SEGMENTER, data)["miou"] == 1.0
    (data / "images").rename(data / "JPEGImages")
    (data / "annotations").rename(data / "SegmentationClass")
    Image.new("RGB", (SIDE, SIDE)).save(data / "JPEGImages" / "without-a-mask.png")
    found = figures("evaluate", SEGMENTER, "--data", data, *PREPARED, *QUIET)
    assert found["result"]["images"] == 4


def test_a_compact_segmenter_is_calibrated_and_evaluated(masks: Path, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    run("convert", SEGMENTER, "-o", file, "--scheme", "lowrank", "--rank", 3, "--calib", masks,
        *PREPARED, *QUIET)  # fmt: skip
    shown = plain(run("evaluate", file, "--data", masks, "--trust-code", *QUIET).output)
    assert "mean IoU" in shown
    assert "100.0" in shown
    assert len(open_unlabelled(masks, count=9)) == 4


def test_a_classifier_has_no_pixels(masks: Path) -> None:
    refused("evaluate", EMBEDDER, "--data", masks, *PREPARED, *QUIET, error_code="not-a-segmenter")


def _lost(file: Path) -> None:
    file.unlink()


def _damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:40])


def _coloured(file: Path) -> None:
    Image.open(file).convert("RGB").save(file)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_lost, "no-masks"),
        (_damaged, "mask-unreadable"),
        (_coloured, "mask-without-classes"),
    ],
)
def test_masks_that_can_not_be_used_are_told(change: Any, code: str, tmp_path: Path) -> None:
    data = write_masks(tmp_path / "m", count=1)
    (data / "annotations" / "validation" / "other.png").write_bytes(b"")
    change(data / "annotations" / "validation" / "0.png")
    refused("evaluate", SEGMENTER, "--data", data, *PREPARED, *QUIET, error_code=code)


# A vote of the nearest


def test_the_nearest_training_images_vote(colours: Path) -> None:
    assert measured(EMBEDDER, colours, "--task", "neighbours") == {"vote": 1.0}


def test_a_folder_without_parts_is_divided_before_it_votes(tmp_path: Path) -> None:
    write_colours(tmp_path / "c")
    found = figures("evaluate", EMBEDDER, "--data", tmp_path / "c" / "train", *PREPARED, *QUIET,
                    "--task", "neighbours")  # fmt: skip
    assert found["result"]["images"] == 3  # a tenth of each class, not all 24
    assert found["result"]["metrics"] == {"vote": 1.0}


def test_data_without_classes_are_not_for_a_vote(masks: Path) -> None:
    refused(
        "evaluate", EMBEDDER, "--data", masks, "--task", "neighbours", error_code="task-mismatch"
    )


def test_a_task_that_there_is_not(colours: Path) -> None:
    refused(
        "evaluate", EMBEDDER, "--data", colours, "--task", "guessing", error_code="unknown-task"
    )


# Classes by their embeddings


def test_an_image_is_of_the_class_whose_embedding_is_nearest(colours: Path, tmp_path: Path) -> None:
    # Class folders are read in the order of their names: blue, green, red.
    save_file({"classes": torch.eye(3).flip(0).contiguous()}, tmp_path / "e.safetensors")
    found = measured(EMBEDDER, colours, "--class-embeddings", tmp_path / "e.safetensors")
    assert found["top1"] == 1.0
    save_file({"classes": torch.eye(3)}, tmp_path / "e.safetensors")
    found = measured(EMBEDDER, colours, "--class-embeddings", tmp_path / "e.safetensors")
    assert found["top1"] == pytest.approx(1 / 3)


def test_clip_is_a_classifier_by_its_image_embeddings(tmp_path: Path) -> None:
    model, data = clip(), write_colours(tmp_path / "d", count=2)
    tied = tiedconv.convert(model, "lowrank", rank=32)
    tiedconv.save(tied, tmp_path / "c.safetensors")
    texts = torch.randint(2, 98, (3, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeddings = model.get_text_features(texts)
    embeddings = getattr(embeddings, "pooler_output", embeddings)
    save_file({"classes": embeddings.contiguous()}, tmp_path / "e.safetensors")
    model.save_pretrained(tmp_path / "clip")
    found = evaluate(
        f"hf:{tmp_path / 'clip'}", data, class_embeddings=tmp_path / "e.safetensors", workers=0,
        device="cpu", preprocess=lambda wanted: wanted.scaled_to(32),
    )  # fmt: skip
    assert found.result.outputs == 3
    assert 0 <= found.result.top1 <= 1


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"a": torch.eye(3), "b": torch.eye(3)}, "class-embeddings-unreadable"),
        ({"a": torch.ones(3)}, "class-embeddings-unreadable"),
        ({"a": torch.ones(3, 5)}, "class-embeddings-unfit"),
    ],
)
def test_embeddings_that_can_not_be_used_are_told(
    tensors: dict[str, Tensor], code: str, colours: Path, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "e.safetensors")
    refused(
        "evaluate",
        EMBEDDER,
        "--data",
        colours,
        *PREPARED,
        *QUIET,
        "--class-embeddings",
        tmp_path / "e.safetensors",
        error_code=code,
    )


def test_features_are_found_by_name_or_form() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert torch.equal(features_of(x), x[:, 0])
    assert torch.equal(features_of(x[:, 0]), x[:, 0])
    assert torch.equal(features_of(x.unsqueeze(3)), x.mean(2))
    named = {"last_hidden_state": x, "pooler_output": x[:, 1], "attentions": x}
    assert torch.equal(features_of(named), x[:, 1])
    with raises(UserError, "features-unknown"):
        features_of({"a": x, "b": x})
