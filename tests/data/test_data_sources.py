"""Laws over every layout that images may be stored in, on the same tiny images in each."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import MODEL_ARGS, QUICK, SPEC, World, figures, plain, refused, run
from data_helpers import (
    CLASSES,
    WRITERS,
    contents,
    datasets,
    each_layout,
    expected,
    one_of_each,
    pictures,
    reader,
    table_of,
    write_tar,
    written,
)
from error_codes import raises
from safetensors.torch import load_file

import tiedconv
from tiedconv.data import Loader, open_images, open_split, open_unlabelled
from tiedconv.data.layouts import all_layouts, layout_of
from tiedconv.data.packed_strings import Names
from tiedconv.errors import DataError, MissingExtra, UserError
from tiedconv.training import Checkpointed, TrainConfig


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets"))
    )


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


# --- laws of every layout ----------------------------------------------------------------------


@each_layout
def test_every_layout_gives_the_same_images(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    split = open_split(spec)
    assert split.classes == split.val.classes == CLASSES
    assert split.labelled
    assert not split.held_out
    assert split.title == name
    assert contents(split.train) == expected("train")
    assert contents(split.val) == contents(open_images(spec)) == expected("val")


@each_layout
def test_a_part_of_each_class_is_held_out(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name, "train")
    split = open_split(spec, val_fraction=0.3, seed=1)
    assert split.held_out
    assert np.bincount(split.val.labels).tolist() == [3, 1, 2]
    assert sorted(contents(split.train) + contents(split.val)) == expected("train")
    again, other = (open_split(spec, val_fraction=0.3, seed=seed) for seed in (1, 2))
    assert contents(again.val) == contents(split.val) != contents(other.val)
    with raises(DataError, "no-validation-part"):
        open_images(spec)


@each_layout
def test_a_limit_is_spread_over_the_classes(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    split = open_split(spec, limit=9)
    assert np.bincount(split.train.labels).tolist() == [3, 3, 3]
    assert len(split.val) == 8
    assert np.bincount(open_images(spec, limit=4).labels).max() == 2
    assert contents(open_split(spec, limit=9).train) == contents(split.train)
    assert contents(open_split(spec, limit=9, seed=3).train) != contents(split.train)
    with raises(UserError, "invalid-limit", "0"):
        open_split(spec, limit=0)


@each_layout
def test_labels_need_not_be_looked_at(tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    some = open_unlabelled(spec, count=5)
    assert len(some) == 5
    assert some.labels is None
    split = open_split(spec, labels="ignore", limit=7)
    assert not split.labelled
    assert split.classes == ()
    assert {pixels for _, pixels in contents(split.val)} <= {
        pixels for _, pixels in expected("val")
    }
    assert len(split.train) == 7


@one_of_each
def test_a_broken_image_is_named_and_left_out(tmp_path: Path, name: str) -> None:
    every = pictures("train")
    every[2] = ("0002", 0, every[2][2][:60])
    every[5] = ("0005", 0, b"no image")
    images = open_split(WRITERS[name](tmp_path / name, {"train": every, "val": every})).train
    (batch,) = Loader(reader(images), 64, workers=0).epoch()
    assert len(batch.images) == 17
    assert len(batch.broken) == 2
    assert all(name in path for path in batch.broken)
    assert "0x" not in str([reader(images)[at] for at in range(len(images))])
    with raises(DataError, "image-unreadable", "strict=True"):
        list(Loader(reader(images, strict=True), 4, workers=0).epoch())


# torch warns of two workers on a machine with one processor.
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", ["shards", "hf-saved"])
def test_workers_change_nothing(tmp_path: Path, name: str) -> None:
    data = reader(open_split(written(tmp_path, name)).train, "crop")
    here, there = (Loader(data, 6, shuffle=True, seed=1, workers=count) for count in (0, 2))
    for one, other in zip(here.epoch(3), there.epoch(3), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    there.close()


@each_layout
def test_what_is_sent_to_workers_is_small_and_whole(tmp_path: Path, name: str) -> None:
    images = open_split(written(tmp_path, name)).train
    contents(images)  # opens files, which are not sent
    sent = pickle.dumps(images)
    assert len(sent) < 5000
    assert contents(pickle.loads(sent)) == contents(images)


def test_every_layout_says_what_it_is() -> None:
    assert list(all_layouts())[-1] == "folder"  # takes what no other does
    for name, layout in all_layouts().items():
        assert layout.name == name
        assert layout.labels_from
        assert layout.expected.startswith("Expected ")
    assert layout_of("hf:cifar10").name == "hf"
    assert layout_of("a/train-{000..003}.tar").name == "shards"


def test_an_index_takes_little_memory() -> None:
    names = [f"n{at % 1000:08}/n{at % 1000:08}_{at}.JPEG" for at in range(5000)]
    kept = Names(names)
    assert list(kept) == names
    assert kept[-1] == kept[4999:][0] == names[-1]
    assert len(pickle.dumps(kept)) < 40 * len(names)
    odd = os.fsdecode(b"\xff.png")
    assert Names([odd])[0] == odd


# --- folders -----------------------------------------------------------------------------------


def test_folders_without_classes(tmp_path: Path) -> None:
    for place in ("flat", "parts/train", "parts/val"):
        (tmp_path / place).mkdir(parents=True)
        for key, _, image in pictures("train"):
            (tmp_path / place / f"{key}.png").write_bytes(image)
    for name, held_out in (("flat", True), ("parts", False)):
        with raises(DataError, "no-labels", "no class folders", "distill_weight=1"):
            open_split(tmp_path / name)
        with raises(DataError, "no-labels"):
            open_images(tmp_path / name)
        split = open_split(tmp_path / name, labels="optional")
        assert split.held_out is held_out
        assert not split.labelled
        assert not set(map(split.val.name, range(len(split.val)))) & set(
            map(split.train.name, range(len(split.train)))
        )


# --- Hugging Face ------------------------------------------------------------------------------


def saved(root: Path, made: Any) -> str:
    made.save_to_disk(str(root))
    return f"hf:{root}"


def test_a_data_set_without_splits_is_divided(tmp_path: Path) -> None:
    spec = saved(tmp_path / "d", table_of(pictures("train")))
    split = open_split(spec, val_fraction=0.3)
    assert (split.held_out, len(split.val)) == (True, 6)
    assert contents(open_images(spec)) == expected("train")


def test_rows_are_read_in_the_order_they_were_saved_in(tmp_path: Path) -> None:
    table = table_of([*pictures("val"), *pictures("train")]).select(range(8, 27)).shuffle(seed=0)
    assert contents(open_images(saved(tmp_path / "d", table))) == expected("train")


def test_columns_and_splits_can_be_named(tmp_path: Path) -> None:
    table = table_of(pictures("train"))
    table = table.add_column("coarse", [0, 1] * 9 + [0]).rename_column("image", "left")
    right = table_of(pictures("train")).select_columns(["image"]).rename_column("image", "right")
    table = datasets.concatenate_datasets([table, right], axis=1)
    spec = saved(tmp_path / "d", datasets.DatasetDict({"all": table, "extra": table}))
    with raises(DataError, "no-train-split", "all, extra", "train=SPLIT"):
        open_split(spec)
    with raises(DataError, "column-unclear", "left, right", "?image=COLUMN"):
        open_split(f"{spec}?train=all")
    with raises(DataError, "unknown-split", " no.", "all, extra"):
        open_split(f"{spec}?train=no")
    with raises(DataError, "column-unclear", " x.", "left, label, coarse, right"):
        open_split(f"{spec}?train=all&image=x")
    split = open_split(f"{spec}?train=all&val=extra&image=left&label=coarse")
    assert split.classes == ("0", "1")
    assert len(split.val) == 19


@pytest.mark.parametrize(
    ("spec", "code", "words"),
    [
        ("hf:nobody/nothing", "data-unreadable", ["nobody/nothing"]),
        ("hf:", "invalid-data-spec", []),
        ("hf:x?colour=red", "invalid-data-spec", ["colour", "image, label"]),
        ("hf:x?image", "invalid-data-spec", ["hf:x?image"]),
    ],
)
def test_data_sets_that_can_not_be_reached(spec: str, code: str, words: list[str]) -> None:
    with raises(DataError, code, *words):
        open_split(spec)


def test_an_empty_row_is_a_broken_image(tmp_path: Path) -> None:
    every = pictures("train")
    made = table_of(every).map(lambda row, at: row | {"image": None} if at == 4 else row,
                               with_indices=True)  # fmt: skip
    images = open_images(saved(tmp_path / "d", made))
    (batch,) = Loader(reader(images), 64, workers=0).epoch()
    assert len(batch.images) == 18
    assert batch.broken == [f"{tmp_path / 'd'} (all), row 4"]


def test_labels_that_will_not_do(tmp_path: Path) -> None:
    table = table_of(pictures("train")).remove_columns("label")
    texts = saved(tmp_path / "texts", table.add_column("label", ["cat"] * 19))
    with raises(DataError, "no-labels", "ClassLabel", "distill_weight=1"):
        open_split(texts)
    with raises(DataError, "invalid-label-column", "label"):
        open_split(f"{texts}?label=label")
    hidden = saved(tmp_path / "hidden", table.add_column("label", [-1] * 19))
    with raises(DataError, "labels-missing", "below 0"):
        open_split(hidden)
    gaps = saved(tmp_path / "gaps", table.add_column("label", [None, *[1] * 18]))
    with raises(DataError, "labels-missing", "empty"):
        open_split(gaps)
    assert not open_split(hidden, labels="ignore").labelled
    none = saved(tmp_path / "none", datasets.Dataset.from_dict({"image": []}))
    with raises(DataError, "data-unreadable"):
        open_split(none)
    plain = saved(tmp_path / "plain", datasets.Dataset.from_dict({"a": [1]}))
    with raises(DataError, "column-unclear", "Image", " a."):
        open_split(plain)


@pytest.mark.parametrize(
    ("package", "extra", "name"),
    [("webdataset", "webdataset", "shards"), ("datasets", "hf-data", "hf-saved")],
)
def test_a_missing_package_is_named(
    package: str, extra: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = written(tmp_path, name)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with raises(MissingExtra, "missing-extra", package, f"tiedconv[{extra}]"):
        open_split(spec)


# --- commands ----------------------------------------------------------------------------------


def finetuned(world: World, output: Path, data: object, *options: object) -> tuple[object, ...]:
    return (
        "finetune", world.tied, "--data", data, "-o", output, "--steps", 2, *QUICK, "--augment",
        "flip", "--teacher", world.weights, *options,
    )  # fmt: skip


@one_of_each
def test_finetune_and_evaluate(world: World, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out.safetensors"
    spec = written(tmp_path, name)
    said = figures(*finetuned(world, output, spec, "--limit", 12))
    assert (said["train_images"], said["val_images"]) == (12, 8)
    assert said["agreement"] is None
    entry = tiedconv.report(output).history[-1]
    assert entry["data"] == name
    assert "agreement" not in entry
    measured = figures("evaluate", output, "--data", spec, "--workers", 0)
    assert measured["classes"] == 3
    assert measured["result"]["top1"] == said["result"]["top1"] == entry["top1"]


def test_training_without_labels(world: World, tmp_path: Path) -> None:
    """By folders that are no classes: the figure is agreement, wherever it is told."""
    output = tmp_path / "out.safetensors"
    nested = Path(written(tmp_path, "folder"))
    reported = run(*finetuned(world, output, nested, "--distill", 1, "--unlabelled"))
    assert "agreement with the teacher" in reported.stdout
    assert "8 validation images without labels" in reported.stdout
    assert "top-1" not in reported.stdout + reported.stderr
    assert "19 images have no labels" in reported.stderr
    entry = tiedconv.report(output).history[-1]
    assert 0 <= entry["agreement_before"] <= 1
    assert entry["top1"] is entry["top5"] is entry["top1_before"] is None
    assert tiedconv.report(output).top1 is None
    assert tiedconv.report(output).agreement == entry["agreement"]
    text = plain(run("report", output).stdout)
    assert "19 images without labels" in text
    assert "agreement with the teacher" in text
    assert "agreement" in run("report", output, world.tied).stdout
    assert "agreement" not in run("report", world.tied, world.tied).stdout
    run("verify", output)
    # A second training with labels measures accuracy again.
    again = tmp_path / "again.safetensors"
    run(
        "finetune", output, "--data", nested, "-o", again, "--steps", 1, *QUICK, "--teacher", "none"
    )
    assert tiedconv.report(again).top1 is not None
    assert tiedconv.report(again).agreement is None


def test_labels_change_nothing_when_the_teacher_is_all(world: World, tmp_path: Path) -> None:
    data = written(tmp_path, "folder")
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    run(*finetuned(world, ours, data, "--distill", 1))
    run(*finetuned(world, theirs, data, "--distill", 1, "--unlabelled"))
    assert tiedconv.report(ours).top1 is not None
    assert_same_tensors(ours, theirs)


@pytest.mark.parametrize("name", ["shards", "hf-saved"])
def test_an_interrupted_run_goes_on(world: World, tmp_path: Path, name: str) -> None:
    data, config = written(tmp_path, name), TrainConfig(epochs=2, batch_size=8, workers=0)
    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"

    def interrupt(event: object) -> None:
        if isinstance(event, Checkpointed):
            raise KeyboardInterrupt

    train = partial(
        tiedconv.finetune, world.tied, data, config=config, teacher="none", device="cpu"
    )
    train(output=whole)
    with pytest.raises(KeyboardInterrupt):
        train(output=parts, on_event=interrupt)
    train(output=parts, resume=True)
    assert_same_tensors(whole, parts)


def assert_same_tensors(one: Path, other: Path) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_agreement_is_what_it_says(world: World, tmp_path: Path) -> None:
    """A model that was not changed at all agrees with itself; labels are never looked at."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for key, _, image in pictures("train"):
        (flat / f"{key}.png").write_bytes(image)
    (flat / "bad.png").write_bytes(b"no")
    said = figures(
        "finetune", world.tied, "--data", flat, "-o", tmp_path / "o.safetensors", "--steps", 1,
        *QUICK, "--teacher", world.tied, "--distill", 1, "--lr", 1e-12, "--val-split", 0.5,
    )  # fmt: skip
    assert said["agreement"] == {"before": 1.0, "after": 1.0}
    assert said["result"]["top1"] is None
    assert said["result"]["history"][0]["agreement"] == 1.0
    assert "top1" not in json.dumps(said["result"]["history"])
    assert said["result"]["skipped"] == 1
    assert said["held_out"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), "no-labels"),
        (("--distill", 1, "--teacher", "none"), "no-labels"),
        (("--unlabelled",), "unlabelled-needs-distillation"),
    ],
)
def test_training_without_labels_refuses(
    world: World, tmp_path: Path, options: tuple[object, ...], code: str
) -> None:
    write_tar(tmp_path / "a.tar", [(f"{k}.png", i) for k, _, i in pictures("train")])
    output = tmp_path / "o.safetensors"
    refused(*finetuned(world, output, tmp_path / "a.tar", *options), error_code=code)
    refused("evaluate", world.tied, "--data", tmp_path / "a.tar", error_code="no-labels")
    assert not output.exists()


def test_a_teacher_of_other_classes_is_refused(world: World, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    sizes = [arg.replace("num_classes=3", "num_classes=7") for arg in MODEL_ARGS]
    run("convert", SPEC, *sizes, "--weights", "none", "-o", other)
    result = run(
        *finetuned(world, tmp_path / "o.safetensors", written(tmp_path, "folder"), "--distill", 1,
        "--unlabelled", "--teacher", other), code=2,
    )  # fmt: skip
    assert "7 outputs and the model 3" in result.stderr.splitlines()[-1]


@one_of_each
def test_calibration_takes_every_layout(world: World, tmp_path: Path, name: str) -> None:
    spec = written(tmp_path, name)
    output = tmp_path / "out.safetensors"
    run(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", output, "--calib", spec,
        "-n", 8, "--effort", "fast", "--workers", 0, "--device", "cpu",
    )  # fmt: skip
    assert tiedconv.report(output).history[-1]["calibration"]["images"] == 8
