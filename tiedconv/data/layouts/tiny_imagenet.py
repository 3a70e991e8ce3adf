"""Tiny-ImageNet as it is distributed: a table names the classes of its validation images.

`ROOT/train/CLASS/images/*.JPEG` is a folder of classes like any other; `ROOT/val/images/*.JPEG` is
not, and would be read as a single class called "images". Each line of the table,
`ROOT/val/val_annotations.txt`, has the name of an image, its class and four values of a box (not
read), divided by tabs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from tiedconv.data.images import Images
from tiedconv.data.layouts._base import Parts, listed
from tiedconv.data.layouts.image_folder import Files, ImageFolder, class_names
from tiedconv.data.packed_strings import Names
from tiedconv.errors import DataError

_TABLE = "val_annotations.txt"


class TinyImageNet(ImageFolder):
    """Class folders to train on; images with a table of their classes to evaluate on."""

    name = "tiny-imagenet"
    last = False
    labels_from = f"class folders, or {_TABLE}"
    expected = f"Expected ROOT/train/CLASS/, ROOT/val/images/ and ROOT/val/{_TABLE}"

    def takes(self, spec: str) -> bool:
        val = Path(spec, "val")
        return (val / _TABLE).is_file() and (val / "images").is_dir()

    def parts(self, spec: str, *, labels: bool) -> Parts:
        found = super().parts(spec, labels=labels)
        if not labels:
            return found
        classes = class_names(Path(spec, "train")) if found.train else None
        return dataclasses.replace(found, val=partial(_annotated, Path(spec), classes))


LAYOUT = TinyImageNet()


def _annotated(root: Path, classes: tuple[str, ...] | None) -> Images:
    """The images of the table; their classes are its own where there is no training part."""
    table = root / "val" / _TABLE
    rows = _rows(table)
    named = sorted({name for _, name in rows})
    classes = classes or tuple(named)
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in named if name not in label_of]:
        raise DataError(
            f"{table} has classes that {root / 'train'} lacks: {listed(unknown)}",
            "The model would be evaluated on other classes than it is trained on",
            "Add their folders, or remove their lines",
            code="classes-differ",
        )
    labels = np.array([label_of[name] for _, name in rows], np.int64)
    store = Files(str(table.parent / "images"), Names(file for file, _ in rows))
    return Images.all_of(store, len(rows), labels, classes)


def _rows(table: Path) -> list[tuple[str, str]]:
    """File and class of each image, sorted by the file."""
    try:
        lines = table.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise DataError(
            f"{table} can't be read ({error})",
            "The images would have no labels",
            code="data-unreadable",
        ) from error
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    for number, row in rows:
        if len(row) < 2 or not all(row[:2]):
            raise DataError(
                f"Line {number} of {table} is not FILE, tab, CLASS: {lines[number - 1][:60]!r}",
                "Its image would have no label",
                "Download the file again",
                code="invalid-class-table",
            )
    if not rows:
        raise DataError(f"{table} is empty", "The images would have no labels", code="no-images")
    return sorted((row[0], row[1]) for _, row in rows)
