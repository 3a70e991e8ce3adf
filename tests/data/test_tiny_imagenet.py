"""Tiny-ImageNet's own way of naming the classes of its validation images."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CLASSES, contents, expected, written

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
    ("line", "message"),
    [
        ("0000.png", r"Line 1 .*'0000.png'.*as it was distributed"),
        ("\tcat", "Line 1 "),
        ("0000.png\tunicorn", r"that .*train has not: unicorn.*remove their lines"),
        ("\n", "is empty"),
        ("\udcff", "can't be read"),
    ],
)
def test_tables_that_will_not_do(root: Path, line: str, message: str) -> None:
    table = root / "val" / "val_annotations.txt"
    table.write_bytes(line.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        open_split(root)
