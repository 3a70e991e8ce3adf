"""Images with boxes in COCO's form: JSON files that list images, categories and annotations.

Known are `ROOT/annotations/instances_train2017.json` with `ROOT/train2017/*.jpg`, the same with
the JSON in ROOT or the photos in `ROOT/images/`, and `ROOT/train/_annotations.coco.json` beside
its photos; `val` likewise. One JSON file may be named as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tiedconv.data.annotations import Floats, Ints, Objects
from tiedconv.data.images import Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, part_of
from tiedconv.errors import DataError
from tiedconv.io.plain_file import require_plain_file


class Coco(Layout):
    """A folder of photos with JSON files of annotations."""

    name = "coco"
    labels_from = "classes for whole images: its annotations are boxes"
    expected = (
        "Expected ROOT/annotations/instances_train2017.json and instances_val2017.json with "
        "ROOT/train2017/*.jpg and ROOT/val2017/*.jpg"
    )

    def takes(self, spec: str) -> bool:
        path = Path(spec)
        if path.is_file():
            return path.suffix == ".json"
        return path.is_dir() and bool(_files(path))

    def parts(self, spec: str, *, labels: bool) -> Parts:
        root = Path(spec)
        if root.is_file():
            beside = root.parent
            above = beside.parent if beside.name == "annotations" else beside
            return Parts(whole=partial(_read, above, root))
        files = _files(root)
        lists = {part: partial(_read, root, file) for part, file in files.items()}
        val = next((lists[name] for name in VAL_NAMES if name in lists), None)
        if val is None and "train" not in lists:
            return Parts(whole=next(iter(lists.values())))
        return Parts(train=lists.get("train"), val=val, train_spec=str(files.get("train", "")))


LAYOUT = Coco()


@dataclass(frozen=True)
class _Photos:
    """The photos that a JSON file lists: a store."""

    root: str
    names: tuple[str, ...]

    def name(self, at: int) -> str:
        return str(Path(self.root, self.names[at]))

    def open(self, at: int) -> str:
        path = self.name(at)
        require_plain_file(Path(path))
        return path


def _files(root: Path) -> dict[str, Path]:
    """Each part's file of annotations; one that names no part is called "all"."""
    places = [root, root / "annotations", *(root / n for n in ("train", *VAL_NAMES))]
    found: dict[str, Path] = {}
    for file in (f for place in places for f in sorted(place.glob("*.json"))):
        if file.name == "_annotations.coco.json":
            found.setdefault(part_of(file.parent.name) or "all", file)
        elif file.name.startswith("instances"):
            found.setdefault(part_of(file.stem) or "all", file)
    return found


_NO_FORM = (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError)
"""What reading raises where a file is not JSON, or lacks what it should hold."""


def _read(root: Path, file: Path) -> Images:
    """The images of one JSON file with their objects."""
    try:
        data = json.loads(file.read_text("utf-8-sig"))
        names = _names(data["images"])
        objects = _objects(data)
    except OSError as error:
        raise DataError(
            f"{file} can't be read ({error.strerror or error})",
            hint="Change its permissions, or copy it to a place of your own",
            code="data-unreadable",
        ) from error
    except _NO_FORM as error:
        raise DataError(
            f"{file} is not a COCO annotation file ({_reason(error)})",
            "Its photos have no known boxes",
            "It needs images (id, file_name, width, height), categories (id, name) and "
            "annotations (image_id, category_id, bbox)",
            code="invalid-coco-file",
        ) from error
    if not names:
        raise DataError(f"{file} lists no images", hint="Give at least one", code="no-images")
    store = _Photos(str(_folder(root, file, names)), names)
    return Images.all_of(store, len(names), None, (), objects)


def _reason(error: Exception) -> str:
    if isinstance(error, InvalidAnnotationError):
        return str(error)
    if isinstance(error, KeyError):
        return f"no {error} where there should be one"
    return f"{type(error).__name__}: {error}"


class InvalidAnnotationError(ValueError):
    """Content that can't be meant."""


def _names(images: Any) -> tuple[str, ...]:
    for image in images:
        name = image["file_name"]
        # A control character would reach the terminal in a message on a broken photo.
        if not isinstance(name, str) or not name or any(ord(c) < 32 or ord(c) == 127 for c in name):
            raise InvalidAnnotationError(f"the image {image['id']} has the file_name {name!r}")
    return tuple(image["file_name"] for image in images)


def _objects(data: Any) -> Objects:
    """What the annotations say, in the order in which the images stand."""
    categories = sorted(data["categories"], key=lambda category: int(category["id"]))
    class_of = _places((category["id"] for category in categories), "categories")
    place_of = _places((image["id"] for image in data["images"]), "images")
    marks = [m for m in data["annotations"] if int(m["image_id"]) in place_of]
    marks.sort(key=lambda mark: place_of[int(mark["image_id"])])
    owners = np.array([place_of[int(mark["image_id"])] for mark in marks], np.int64)
    for mark in marks:
        if int(mark["category_id"]) not in class_of:
            raise InvalidAnnotationError(
                f"an object has the category {mark['category_id']}, which is not listed"
            )
    boxes = _boxes(marks)
    given = [mark.get("area") for mark in marks]
    areas = np.array(
        [np.prod(b[2:]) if a is None else a for a, b in zip(given, boxes, strict=True)]
    )
    return Objects(
        starts=np.searchsorted(owners, np.arange(len(place_of) + 1)).astype(np.int64),
        boxes=boxes,
        classes=np.array([class_of[int(m["category_id"])] for m in marks], np.int64),
        areas=_checked(areas.astype(np.float64), marks, "area"),
        iscrowd=np.array([int(m.get("iscrowd") or 0) for m in marks], np.int64),
        sizes=_sizes(data["images"]),
        names=tuple(str(category["name"]) for category in categories),
        category_ids=tuple(class_of),
    )


def _places(ids: Iterable[Any], what: str) -> dict[int, int]:
    """Where each number stands; twice the same would leave open which one is meant."""
    places: dict[int, int] = {}
    for number in map(int, ids):
        if number in places:
            raise InvalidAnnotationError(f"two {what} have the id {number}")
        places[number] = len(places)
    return places


def _boxes(marks: list[Any]) -> Floats:
    """Boxes (M, 4). They may reach out of the image or have no area, as in COCO itself."""
    for mark in marks:
        if not isinstance(mark["bbox"], list) or len(mark["bbox"]) != 4:
            raise InvalidAnnotationError(
                f"an object of the image {mark['image_id']} has the bbox {mark['bbox']!r}"
            )
    boxes = np.array([mark["bbox"] for mark in marks], np.float64).reshape(-1, 4)
    _checked(boxes[:, 2:], marks, "bbox")
    return _checked(boxes, marks, "bbox", signed=True)


def _checked(values: Floats, marks: list[Any], key: str, *, signed: bool = False) -> Floats:
    """The values, if they are finite: NaN would match any detection."""
    right = np.isfinite(values) & (signed | (values >= 0))
    if len(wrong := np.argwhere(~right)):
        mark = marks[int(wrong[0, 0])]
        raise InvalidAnnotationError(
            f"an object of the image {mark['image_id']} has the {key} {mark[key]}"
        )
    return values


def _sizes(images: Any) -> Ints:
    sizes = np.array([[i["width"], i["height"]] for i in images], np.float64).reshape(-1, 2)
    if len(wrong := np.flatnonzero(~((sizes >= 1) & (sizes < 2**31)).all(axis=1))):
        image = images[int(wrong[0])]
        raise InvalidAnnotationError(
            f"the image {image['id']} has the width {image['width']} "
            f"and the height {image['height']}"
        )
    return sizes.astype(np.int64)


_TRIED = 100
"""So many photos are looked for: the first one may be missing."""


def _folder(root: Path, file: Path, names: tuple[str, ...]) -> Path:
    """Where the photos lie."""
    part = file.stem.removeprefix("instances").lstrip("_") or "images"
    places = [root / "images" / part, root / part, file.parent, root / "images", root]
    for place in places:
        if any((place / name).is_file() for name in names[:_TRIED]):
            return place
    raise DataError(
        f"{file} lists {names[0]}, which is in none of {', '.join(str(p) for p in places)}",
        "The photos can't be found",
        LAYOUT.expected,
        code="photos-missing",
    )
