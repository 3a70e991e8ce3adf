"""Finds images and their classes in a folder.

Two layouts are known. As ImageNet has it: `ROOT/train/CLASS/...` and `ROOT/val/CLASS/...` (or
`test`). Or class folders directly, `ROOT/CLASS/...`, of which a seeded part of each class is
held out. Inside a class folder images may lie at any depth. The label of a class is its place
in the sorted list of folder names, as torchvision's `ImageFolder` counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tiedconv.errors import DataError, UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""File name endings of images, compared in lower case."""

VAL_NAMES = ("val", "valid", "validation", "test")
"""Names of the folder to evaluate on, the first that exists is used."""

LAYOUT = (
    "Expected ROOT/train/CLASS/*.jpg with ROOT/val/CLASS/*.jpg (or ROOT/test), "
    "or class folders directly: ROOT/CLASS/*.jpg"
)


@dataclass(frozen=True)
class Images:
    """Image files and their labels; holds names only, no pixels.

    Attributes:
        root: the folder that `names` start from.
        names: one relative file name per image.
        labels: one index into `classes` per image.
        classes: the sorted class names.
    """

    root: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """The full path of one image."""
        return self.root / self.names[index]


@dataclass(frozen=True)
class Split:
    """Images to train on and images to evaluate on; both have the same classes.

    Attributes:
        train: the training images.
        val: the images to evaluate on.
        held_out: whether `val` was held out of the training folder.
    """

    train: Images
    val: Images
    held_out: bool

    @property
    def classes(self) -> tuple[str, ...]:
        """The sorted class names."""
        return self.train.classes


def find_split(
    root: str | Path, *, val_fraction: float = 0.1, seed: int = 0, limit: int | None = None
) -> Split:
    """Finds training and validation images.

    Args:
        root: a folder with `train/` and `val/` (or `test/`), or of class folders.
        val_fraction: share of each class to hold out where there is no validation folder.
        seed: decides which images are held out, and which ones `limit` keeps.
        limit: at most so many images in each of the two parts, spread evenly over the classes.

    Raises:
        DataError: no images, a class without images, or parts with different classes.
        UserError: `val_fraction` or `limit` out of range.
    """
    folder = _existing(root)
    if not 0 < val_fraction < 1:
        raise UserError(
            f"The held-out share is {val_fraction}", remedy="Choose a number between 0 and 1"
        )
    if limit is not None and limit < 1:
        raise UserError(f"The limit is {limit} images", remedy="Choose 1 or more")
    train_root = folder / "train"
    if not _is_part(train_root):
        _refuse_half_layout(folder)
        train_root = folder
    train = _Tree.scan(train_root)
    train.require_all_classes()
    val_root = None if train_root == folder else _val_folder(folder)
    if val_root is None:
        train, val = train.hold_out(val_fraction, seed)
    else:
        val = _Tree.scan(val_root)
        _require_same_classes(train, val)
    return Split(
        train.limited(limit, seed).images(),
        val.limited(limit, seed).images(),
        held_out=val_root is None,
    )


def find_images(root: str | Path, *, seed: int = 0, limit: int | None = None) -> Images:
    """Finds the images to evaluate on: `val/`, else `test/`, else all class folders of `root`.

    Args:
        root: the folder.
        seed: decides which images `limit` keeps.
        limit: at most so many images, spread evenly over the classes.

    Raises:
        DataError: no images, or only a `train/` folder.
    """
    folder = _existing(root)
    val_root = _val_folder(folder)
    if val_root is None and _is_part(folder / "train"):
        raise DataError(
            f"{folder} has train/ but no val/ or test/",
            "There is nothing to evaluate on",
            f"Pass {folder / 'train'} to evaluate on the training images",
        )
    return _Tree.scan(val_root or folder).limited(limit, seed).images()


def find_unlabelled(root: str | Path, *, count: int, seed: int = 0) -> Images:
    """Some images of a folder, whatever their classes: `train/` if there is one, else all.

    Args:
        root: the folder; images may lie at any depth, in class folders or not.
        count: at most so many.
        seed: decides which.

    Returns:
        the images in the order of their names, all with label 0.

    Raises:
        DataError: no images.
        UserError: `count` below 2.
    """
    folder = _existing(root)
    if count < 2:
        raise UserError(f"{count} calibration images were asked for", remedy="Use 2 or more")
    folder = folder / "train" if _is_part(folder / "train") else folder
    names = _images_below(folder, "")
    if not names:
        raise DataError(
            f"There are no images in {folder}",
            "Nothing can be measured",
            f"Give a folder that holds images ({', '.join(SUFFIXES)})",
        )
    chosen = sorted(_shuffled(len(names), seed, 0)[:count])
    return Images(folder, tuple(names[i] for i in chosen), (0,) * len(chosen), ("",))


@dataclass(frozen=True)
class _Tree:
    """The image names of each class below one folder."""

    root: Path
    classes: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]

    @classmethod
    def scan(cls, root: Path) -> _Tree:
        """Lists all images below `root` by class; order does not depend on the file system."""
        classes = tuple(sorted(entry.name for entry in _entries(root) if _is_folder(entry)))
        if not classes:
            raise DataError(f"{root} has no class folders", "No images were found", LAYOUT)
        names = tuple(_images_below(root, name) for name in classes)
        if not any(names):
            raise DataError(f"The class folders of {root} hold no images", "", LAYOUT)
        return cls(root, classes, names)

    def require_all_classes(self) -> None:
        """Raises DataError when a class has no image to learn from."""
        empty = [name for name, files in zip(self.classes, self.names, strict=True) if not files]
        if empty:
            raise DataError(
                f"{_listed(empty)} in {self.root} without images",
                "A class can't be learned from nothing",
                "Add images to it or remove the folder",
            )

    def hold_out(self, fraction: float, seed: int) -> tuple[_Tree, _Tree]:
        """Splits each class: (the rest, about `fraction` of it, at least one image of two)."""
        kept: list[tuple[str, ...]] = []
        held: list[tuple[str, ...]] = []
        for label, files in enumerate(self.names):
            count = min(len(files) - 1, max(1, round(fraction * len(files))))
            chosen = set(_shuffled(len(files), seed, label)[:count])
            held.append(tuple(name for at, name in enumerate(files) if at in chosen))
            kept.append(tuple(name for at, name in enumerate(files) if at not in chosen))
        if not any(held):
            raise DataError(
                f"Every class of {self.root} has one image only",
                "No image can be held out for evaluation",
                "Add images, or a val/ folder beside train/",
            )
        return (
            _Tree(self.root, self.classes, tuple(kept)),
            _Tree(self.root, self.classes, tuple(held)),
        )

    def limited(self, limit: int | None, seed: int) -> _Tree:
        """At most `limit` images, as even over the classes as they allow."""
        if limit is None or sum(map(len, self.names)) <= limit:
            return self
        # Each class is shuffled by itself; then the first of each class come, the second, ...
        ranked = sorted(
            (rank, label, at)
            for label, files in enumerate(self.names)
            for rank, at in enumerate(_shuffled(len(files), seed, label))
        )
        kept = {(label, at) for _, label, at in ranked[:limit]}
        names = (
            tuple(name for at, name in enumerate(files) if (label, at) in kept)
            for label, files in enumerate(self.names)
        )
        return _Tree(self.root, self.classes, tuple(names))

    def images(self) -> Images:
        """The flat list, class by class."""
        return Images(
            self.root,
            tuple(name for files in self.names for name in files),
            tuple(label for label, files in enumerate(self.names) for _ in files),
            self.classes,
        )


def _existing(root: str | Path) -> Path:
    folder = Path(root)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(f"The data folder {folder} {what}", "", LAYOUT)
    return folder


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError as error:
        raise DataError(
            f"The data folder {folder} can't be read ({error.strerror or error})",
            remedy="Change its permissions, or copy it to a place of your own",
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith((".", "__"))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _is_part(folder: Path) -> bool:
    """Whether this is a `train/` of class folders, not a class that is called "train"."""
    if not folder.is_dir():
        return False
    entries = _entries(folder)
    return any(map(_is_folder, entries)) and not any(_is_image(entry.name) for entry in entries)


def _val_folder(folder: Path) -> Path | None:
    return next((folder / name for name in VAL_NAMES if _is_part(folder / name)), None)


def _refuse_half_layout(folder: Path) -> None:
    """A validation folder of class folders without a training folder would become a class."""
    val_root = _val_folder(folder)
    if val_root is not None:
        raise DataError(
            f"{folder} has {val_root.name}/ but no train/ with class folders",
            "There is nothing to train on",
            LAYOUT,
        )


def _images_below(root: Path, class_name: str) -> tuple[str, ...]:
    start = len(os.path.join(root, ""))
    found = (
        os.path.join(where, name)[start:]
        for where, _, names in os.walk(root / class_name, followlinks=True)
        for name in names
        if _is_image(name)
    )
    return tuple(sorted(found))


def _shuffled(count: int, seed: int, label: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, label]).permutation(count).tolist()
    return order


def _require_same_classes(train: _Tree, val: _Tree) -> None:
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    if not only_train and not only_val:
        return
    parts = [
        f"only {tree.root} has the {_listed(names)}"
        for tree, names in ((train, only_train), (val, only_val))
        if names
    ]
    raise DataError(
        f"Training and validation classes differ: {'; '.join(parts)}",
        "Their labels would not mean the same",
        "Give both folders the same class folders (an empty one will do in validation)",
    )


def _listed(names: Sequence[str]) -> str:
    """Names for a message, at most five of them."""
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"class{'es' if len(names) > 1 else ''} {shown}"
