"""Images in a folder.

With classes: as ImageNet has it, `ROOT/train/CLASS/...` and `ROOT/val/CLASS/...` (or `test`), or
class folders directly, `ROOT/CLASS/...`. Inside a class folder images may lie at any depth. The
label of a class is its place in the sorted list of folder names, as torchvision's `ImageFolder`
counts. Without classes: images in `ROOT`, or in `ROOT/train` and `ROOT/val`; where labels are not
looked for, at any depth.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tiedconv.data.annotations import Ints
from tiedconv.data.images import SUFFIXES, Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, listed
from tiedconv.data.packed_strings import Names
from tiedconv.errors import DataError
from tiedconv.io.plain_file import require_plain_file

_ANY_FOLDER = f"Give a folder that holds images ({', '.join(SUFFIXES)}), at any depth"


class ImageFolder(Layout):
    """Image files in folders."""

    name = "folder"
    last = True
    labels_from = "class folders"
    expected = (
        "Expected ROOT/train/CLASS/*.jpg with ROOT/val/CLASS/*.jpg (or ROOT/test), "
        "or class folders directly: ROOT/CLASS/*.jpg"
    )

    def takes(self, spec: str) -> bool:
        return True

    def parts(self, spec: str, *, labels: bool) -> Parts:
        folder = _existing(spec, self.expected if labels else _ANY_FOLDER)
        train = folder / "train"
        if not labels:
            if not (_is_part(train) or _flat_parts(folder)):
                return Parts(whole=partial(_flat, folder))
            val = next((folder / n for n in VAL_NAMES if (folder / n).is_dir()), None)
            return Parts(
                train=partial(_flat, train), val=None if val is None else partial(_flat, val)
            )
        if flat := _flat_parts(folder):
            return Parts(train=partial(_flat, flat[0]), val=partial(_flat, flat[1]))
        val = next((folder / name for name in VAL_NAMES if _is_part(folder / name)), None)
        if _is_part(train):
            return Parts(
                train=partial(_classes, train, complete=True),
                val=None if val is None else partial(_classes, val),
                train_spec=str(train),
            )
        if val is not None:
            # A validation folder of class folders alone would otherwise become a class.
            return Parts(val=partial(_classes, val))
        return Parts(whole=partial(_classes, folder, complete=True))


LAYOUT = ImageFolder()


@dataclass(frozen=True)
class Files:
    """Image files below a folder: a store."""

    root: str
    names: Names

    def name(self, at: int) -> str:
        """The path of a file."""
        return os.path.join(self.root, self.names[at])

    def open(self, at: int) -> str:
        """The path of a file, for Pillow; an OSError if it is a pipe or a device."""
        path = self.name(at)
        require_plain_file(Path(path))
        return path

    def size(self, at: int) -> int:
        """Bytes of a file; -1 if it can't be reached."""
        try:
            return os.path.getsize(self.name(at))
        except OSError:
            return -1


def class_names(root: Path) -> tuple[str, ...]:
    """The class folders of a folder, sorted: the place of each is its label."""
    return tuple(sorted(entry.name for entry in _entries(root) if _is_folder(entry)))


def _classes(root: Path, *, complete: bool = False) -> Images:
    """All images below the class folders of `root`; order does not depend on the file system.

    With `complete` each class must have an image.
    """
    classes = class_names(root)
    if not classes and any(_is_image(entry.name) for entry in _entries(root)):
        return _flat(root)
    if not classes:
        raise DataError(
            f"{root} has no class folders and no images", "", LAYOUT.expected, code="no-images"
        )
    counts = np.zeros(len(classes), np.int64)

    def every() -> Iterator[str]:
        for label, name in enumerate(classes):
            found = _images_below(root, name)
            counts[label] = len(found)
            yield from found

    names = Names(every())
    if not len(names):
        raise DataError(
            f"The class folders of {root} hold no images", "", LAYOUT.expected, code="no-images"
        )
    if complete and not counts.all():
        empty = [classes[label] for label in np.flatnonzero(counts == 0)]
        raise DataError(
            f"{'Classes' if len(empty) > 1 else 'The class'} {listed(empty)} in {root} "
            f"{'are' if len(empty) > 1 else 'is'} without images",
            "A class can't be learned from nothing",
            "Add images to it or remove the folder",
            code="empty-class",
        )
    labels: Ints = np.repeat(np.arange(len(classes)), counts)
    return Images.all_of(Files(str(root), names), len(names), labels, classes)


def _flat(root: Path) -> Images:
    """All images below a folder, without labels."""
    names = Names(_images_below(root, ""))
    if not len(names):
        raise DataError(f"There are no images in {root}", "", _ANY_FOLDER, code="no-images")
    return Images.all_of(Files(str(root), names), len(names), None, ())


def _existing(spec: str, expected: str) -> Path:
    folder = Path(spec)
    if not os.path.isdir(folder):
        what = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(f"The data folder {folder} {what}", "", expected, code="no-data-folder")
    return folder


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"The data folder {folder} can't be read ({error.strerror or error})",
            hint="Change its permissions, or copy it to a place of your own",
            code="data-unreadable",
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_part(folder: Path) -> bool:
    """Whether this is a `train/` of class folders, not a class that is called "train"."""
    if not os.path.isdir(folder):
        return False
    entries = _entries(folder)
    return any(map(_is_folder, entries)) and not any(_is_image(entry.name) for entry in entries)


def _flat_parts(folder: Path) -> tuple[Path, Path] | None:
    """The folders `train/` and `val/` (or `test/`) where both hold images without classes.

    By their names they are meant as parts, and hardly ever as two classes.
    """
    for name in VAL_NAMES:
        pair = folder / "train", folder / name
        if all(_is_flat(part) for part in pair):
            return pair
    return None


def _is_flat(folder: Path) -> bool:
    if not os.path.isdir(folder):
        return False
    entries = _entries(folder)
    return any(_is_image(entry.name) for entry in entries) and not any(map(_is_folder, entries))


def _images_below(root: Path, class_name: str) -> list[str]:
    start = len(os.path.join(root, ""))
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(root / class_name, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:  # a link back up: its images were listed
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # the same of two links is followed on any file system
        found += [os.path.join(where, name)[start:] for name in names if _is_image(name)]
    return sorted(found)
