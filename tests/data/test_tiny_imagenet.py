"""Tiny-ImageNet's own way of naming the classes of its validation images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CLASSES, contents, expected, written
from error_codes import raises

from tiedconv.data import open_images, open_split
from tiedconv.errors import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return Path(written(tmp_path, "tiny-imagenet"))


def test_the_validation_part_stands_alone(root: Path) -> None:
    shutil.rmtree(root / "train")
    images = open_images(root)
    assert images.classes == CLASSES
    assert contents(images) == expected("val")


def test_a_class_without_validation_images_keeps_its_place(root: Path) -> None:
    table = root / "val" / "val_annotations.txt"
    lines = [line for line in table.read_text().splitlines() if f"\t{CLASSES[0]}\t" not in line]
    table.write_text("\r\n".join([*lines, ""]))
    val = open_split(root).val
    assert val.classes == CLASSES
    assert np.unique(val.labels).tolist() == [1, 2]


def test_class_folders_of_a_validation_part_put_in_order_count(root: Path) -> None:
    shutil.rmtree(root / "val" / "images")
    shutil.copytree(root / "train", root / "val", dirs_exist_ok=True)
    assert contents(open_images(root)) == expected("train")


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("0000.png", "invalid-class-table", ["Line 1 ", "'0000.png'"]),
        ("\tcat", "invalid-class-table", ["Line 1 "]),
        ("0000.png\tunicorn", "classes-differ", ["unicorn", "train"]),
        ("\n", "no-images", []),
        ("\udcff", "data-unreadable", []),
    ],
)
def test_tables_that_will_not_do(root: Path, line: str, code: str, words: list[str]) -> None:
    table = root / "val" / "val_annotations.txt"
    table.write_bytes(line.encode("utf-8", "surrogateescape"))
    with raises(DataError, code, "val_annotations.txt", *words):
        open_split(root)
