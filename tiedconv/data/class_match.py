"""Which output of a model each class of a data set belongs to."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiedconv.data.images import Images, are_indices
from tiedconv.data.layouts._base import listed
from tiedconv.errors import DataError, UserError
from tiedconv.io.plain_file import read_text
from tiedconv.sources.class_names import ClassNames, imagenet_names

BY_POSITION = "position"
_MOST = 2**24  # bytes of a class map


@dataclass(frozen=True)
class ClassMatch:
    """How the classes of data were matched to a model's outputs.

    Attributes:
        how: `name`, `class map`, `position`, or `index` where the data have indices, not names.
        classes: the number of classes of the data.
        numbers_as_text: the first folder whose name is another number than its label, "" if none.
    """

    how: str
    classes: int
    numbers_as_text: str = ""


def match_classes(
    images: Images, known: ClassNames | None, class_map: str | Path | None = None
) -> tuple[Images, ClassMatch | None]:
    """The images with the labels of the model's outputs.

    Args:
        images: of a data set with classes; others are given back as they are.
        known: the names of the model's classes; None if nothing says what they are.
        class_map: see `read_class_map`; `position` for the order of the data's own names.

    Returns:
        the images, and how their classes were matched: by the class map, else by the names of
        both sides, else by position. Where positions alone decide, `training.evaluation` refuses
        data with fewer classes than the model has outputs.

    Raises:
        DataError: a class of the data is not among the model's (`classes-unmatched`).
        UserError: the class map can't be read.
    """
    names = images.classes
    if images.labels is None or not names:
        return images, None
    if class_map is not None and str(class_map) != BY_POSITION:
        return _renumbered(images, read_class_map(class_map), "class map")
    if are_indices(names):
        return images, ClassMatch("index", len(names))
    if known is not None and class_map is None:
        return _renumbered(images, known, "name")
    if class_map is not None:
        # More outputs than classes are what was asked for: the labels are indices from here on.
        images = replace(images, classes=tuple(map(str, range(len(names)))))
    return images, ClassMatch(BY_POSITION, len(names), _odd_number(names))


def read_class_map(path: str | Path) -> ClassNames:
    """The class names in the order of the model's outputs.

    Args:
        path: `imagenet`; or a file: a JSON list of names, a JSON object of names and indices, or
            text with one name in each line.

    Raises:
        UserError: it can't be read, or names are missing (`class-map-unreadable`).
    """
    if str(path) == "imagenet":
        return imagenet_names()
    path = Path(path)
    try:
        return _parsed(read_text(path, _MOST))
    except (OSError, ValueError) as error:
        raise UserError(
            f"The class map {path} can't be read ({error})",
            "The labels of the images would be unknown",
            "Give one name for each output: one in each line, or JSON",
            code="class-map-unreadable",
        ) from error


def _parsed(text: str) -> ClassNames:
    if text.lstrip()[:1] not in ("{", "["):
        return tuple((line.strip(),) for line in text.splitlines() if line.strip())
    data = json.loads(text)
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        return tuple((name,) for name in data)
    if isinstance(data, dict) and all(type(i) is int and i >= 0 for i in data.values()):
        names: list[list[str]] = [[] for _ in range(min(max(data.values(), default=0) + 1, _MOST))]
        for name, index in data.items():
            names[index].append(name)
        return tuple(map(tuple, names))
    raise ValueError("it is neither a list of names nor an object of names and indices")


def _renumbered(images: Images, known: ClassNames, how: str) -> tuple[Images, ClassMatch]:
    index = _finder(known)
    found = [index(name) for name in images.classes]
    if missing := [n for n, i in zip(images.classes, found, strict=True) if i is None]:
        raise DataError(
            f"The model has no class {listed(missing)}, of {len(missing)} of {len(found)} classes "
            f"of the data",
            "Their labels would not mean the same",
            "Say which output each class is with --class-map FILE, or --class-map position for "
            "the order of their names",
            code="classes-unmatched",
        )
    if len(set(found)) < len(found):
        raise DataError(
            "Two classes of the data have the name of one class of the model",
            "Their labels would not mean the same",
            "Say which output each class is with --class-map FILE",
            code="classes-unmatched",
        )
    assert images.labels is not None
    labels = np.array(found, np.int64)[images.labels]
    first = tuple(names[0] if names else str(i) for i, names in enumerate(known))
    return replace(images, labels=labels, classes=first), ClassMatch(how, len(found))


def _finder(known: ClassNames) -> Callable[[str], int | None]:
    """From a name to the class that alone has it: as it is written, else without regard to case."""
    exact, loose = _unique(known, str), _unique(known, _plain)
    return lambda name: exact.get(name, loose.get(_plain(name)))


def _unique(known: ClassNames, form: Callable[[str], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    doubtful: set[str] = set()
    for index, names in enumerate(known):
        for name in names:
            if found.setdefault(form(name), index) != index:
                doubtful.add(form(name))
    return {name: index for name, index in found.items() if name not in doubtful}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _odd_number(names: Sequence[str]) -> str:
    """Where all names are numbers, sorted as text: the first that is not its label."""
    if not all(name.isdecimal() for name in names):
        return ""
    return next((name for label, name in enumerate(names) if int(name) != label), "")
