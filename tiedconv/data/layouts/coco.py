"""Images with boxes in COCO's form: JSON files that list images, categories and annotations.

Known are `ROOT/annotations/instances_train2017.json` with `ROOT/train2017/*.jpg`, the same with
the JSON in ROOT or the photos in `ROOT/images/`, and `ROOT/train/_annotations.coco.json` beside
its photos; `val` likewise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tiedconv.data.images import Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, part_of
from tiedconv.data.objects import Objects
from tiedconv.errors import DataError


class Coco(Layout):
    """A folder of photos with JSON files of annotations."""

    name = "coco"
    labels_from = "classes for whole images: its annotations are boxes"
    expected = (
        "Expected ROOT/annotations/instances_train2017.json and instances_val2017.json with "
        "ROOT/train2017/*.jpg and ROOT/val2017/*.jpg"
    )

    def takes(self, spec: str) -> bool:
        return Path(spec).is_dir() and bool(_files(Path(spec)))

    def parts(self, spec: str, *, labels: bool) -> Parts:
        root = Path(spec)
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
        return self.name(at)


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


def _read(root: Path, file: Path) -> Images:
    """The images of one JSON file with their objects."""
    try:
        data = json.loads(file.read_text("utf-8"))
        objects, names = _parsed(data)
    except OSError as error:
        raise DataError(
            f"{file} can't be read ({error.strerror or error})",
            remedy="Change its permissions, or copy it to a place of your own",
        ) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{file} is not in COCO's form ({type(error).__name__}: {error})",
            "Nothing says what its photos show",
            "It needs images (id, file_name, width, height), categories (id, name) and "
            "annotations (image_id, category_id, bbox)",
        ) from error
    if not names:
        raise DataError(f"{file} lists no images", remedy="Give at least one")
    return Images.all_of(
        _Photos(str(_folder(root, file, names[0])), names), len(names), None, (), objects
    )  # fmt: skip


def _parsed(data: Any) -> tuple[Objects, tuple[str, ...]]:
    """Objects and file names, in the order in which the images stand."""
    categories = sorted(data["categories"], key=lambda category: int(category["id"]))
    class_of = {int(category["id"]): i for i, category in enumerate(categories)}
    place_of = {int(image["id"]): i for i, image in enumerate(data["images"])}
    marks = [m for m in data["annotations"] if int(m["image_id"]) in place_of]
    marks.sort(key=lambda mark: place_of[int(mark["image_id"])])
    counts = np.zeros(len(place_of) + 1, np.int64)
    for mark in marks:
        counts[place_of[int(mark["image_id"])] + 1] += 1
    boxes = np.array([mark["bbox"] for mark in marks], np.float64).reshape(-1, 4)
    objects = Objects(
        starts=np.cumsum(counts),
        boxes=boxes,
        classes=np.array([class_of[int(m["category_id"])] for m in marks], np.int64),
        areas=np.array([m.get("area", m["bbox"][2] * m["bbox"][3]) for m in marks], np.float64),
        crowds=np.array([int(m.get("iscrowd", 0)) for m in marks], np.int64),
        sizes=np.array([[i["width"], i["height"]] for i in data["images"]], np.int64),
        names=tuple(str(category["name"]) for category in categories),
        numbers=tuple(class_of),
    )
    return objects, tuple(str(image["file_name"]) for image in data["images"])


def _folder(root: Path, file: Path, first: str) -> Path:
    """Where the photos lie."""
    part = file.stem.removeprefix("instances").lstrip("_") or "images"
    places = [root / "images" / part, root / part, file.parent, root / "images", root]
    for place in places:
        if (place / first).is_file():
            return place
    raise DataError(
        f"{file} lists {first}, which is in none of {', '.join(str(p) for p in places)}",
        "The photos can't be found",
        LAYOUT.expected,
    )
