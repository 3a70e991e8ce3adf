"""Which of a model's classes each class of a data set is."""

from __future__ import annotations

import re

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
    by_name = {_plain(str(name)): int(i) for i, name in named.items()}
    wanted = [_plain(name) for name in objects.names]
    if all(name in by_name for name in wanted):
        return tuple(by_name[name] for name in wanted)
    if count == len(wanted):
        return tuple(range(count))
    if max(objects.numbers) < count and not any(_is_named(str(n)) for n in named.values()):
        return objects.numbers
    missing = next(name for name in wanted if name not in by_name)
    raise DataError(
        f"The data have {len(wanted)} classes, the model {count}, and it knows no {missing!r}",
        "Its detections can't be compared with the data",
        "Use data with the classes that the model was made for",
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _is_named(name: str) -> bool:
    return not re.fullmatch(r"LABEL_\d+", name)
