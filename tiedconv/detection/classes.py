"""Mapping of the classes of a data set to a model's classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from tiedconv.data import Objects
from tiedconv.detection.outputs import label_count
from tiedconv.errors import DataError


def class_map(model: nn.Module, objects: Objects, outputs: int) -> tuple[int, ...]:
    """The model's class for each class of the data, in the order of the data.

    By name where the model names its classes and has all of these; else one by one where there
    are as many; else by the data's own numbers, as models of all of COCO's 91 numbers have them.

    Args:
        model: the detector.
        objects: of the data.
        outputs: logits of each query.

    Raises:
        DataError: neither fits.
    """
    count = label_count(model, outputs)
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    known = {int(i): str(name) for i, name in named.items()}
    by_name = _by_name(known, objects.names)
    if by_name is not None:
        return by_name
    if count == len(objects.names):
        return tuple(range(count))
    numbers = objects.category_ids
    if min(numbers) >= 0 and max(numbers) < count and not any(map(_is_named, known.values())):
        return numbers
    spelled = {_plain(name) for name in known.values()}
    missing = [name for name in objects.names if _plain(name) not in spelled]
    unlike = f"it has no class {missing[0]!r}" if missing else "some have the same name"
    raise DataError(
        f"The data have {len(objects.names)} classes, the model {count}, and {unlike}",
        "Its detections can't be evaluated on the data",
        "Use data with the classes that the model was made for",
        code="classes-mismatch",
    )


def _by_name(known: Mapping[int, str], wanted: Sequence[str]) -> tuple[int, ...] | None:
    """The model's class for each name; spelled alike, if exactly doesn't do. None if unclear."""
    for spelled in (str, _plain):
        numbers = {spelled(name): i for i, name in known.items()}
        times = Counter(spelled(name) for name in (*known.values(), *wanted))
        if all(spelled(n) in numbers and times[spelled(n)] == 2 for n in wanted):  # once in each
            return tuple(numbers[spelled(name)] for name in wanted)
    return None


def _plain(name: str) -> str:
    """A name in small letters and digits of any script; one that has none stays as it is."""
    return re.sub(r"[\W_]", "", name.casefold()) or name


def _is_named(name: str) -> bool:
    return not re.fullmatch(r"LABEL_\d+", name)
