"""What the outputs of a classifier stand for, where somebody says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tiedconv.errors import MissingExtra
from tiedconv.sources.published_weights import published
from tiedconv.sources.source import Source

ClassNames = tuple[tuple[str, ...], ...]
"""For each output the names of its class, such as a WordNet number and words."""

MAX_CLASSES = 25_000  # whose names are kept in a file
_PLACEHOLDER = re.compile(r"(LABEL_)?\d+")


def class_names_of(
    source: Source, model: nn.Module, history: Sequence[Mapping[str, Any]] = ()
) -> ClassNames | None:
    """The names of a model's classes; None where nothing says what they are.

    Weights from a file may be of any classes, so only published weights are known by their name.

    Args:
        source: where the model came from.
        model: the model.
        history: of the compact file: a fine-tuning records its classes.
    """
    for step in reversed(history):
        if classes := step.get("classes"):
            return tuple((str(name),) for name in classes)
    if (labels := (source.config or {}).get("id2label")) and isinstance(labels, Mapping):
        names = tuple((str(labels.get(str(i), i)),) for i in range(len(labels)))
        if not all(_PLACEHOLDER.fullmatch(name) for (name,) in names):
            return names
    if source.weights != "default":
        return None
    if source.spec.startswith("timm:"):
        return _published_by_timm(model)
    return _published_by_torchvision(source.spec)


def imagenet_names() -> ClassNames:
    """The WordNet numbers and words of ImageNet's 1,000 classes, in the usual order.

    Raises:
        MissingExtra: timm, which has the list, is not installed.
    """
    try:
        import timm.data
    except ImportError as error:
        raise MissingExtra.of("timm", "timm", "The class map imagenet") from error
    return _named(timm.data.ImageNetInfo("imagenet-1k"))


def _published_by_timm(model: nn.Module) -> ClassNames | None:
    import timm.data

    subset = timm.data.infer_imagenet_subset(model)
    return _named(timm.data.ImageNetInfo(subset)) if subset else None


def _published_by_torchvision(spec: str) -> ClassNames | None:
    name, _, member = spec.partition(".")
    weights = getattr(published(name), member or "DEFAULT", None)
    words = tuple((str(name),) for name in weights.meta.get("categories", ())) if weights else ()
    if len(words) != 1000:
        return words or None
    try:
        numbers = imagenet_names()
    except MissingExtra:
        return words
    return tuple((*a, *b) for a, b in zip(numbers, words, strict=True))


def _named(info: Any) -> ClassNames:
    found = []
    for index, name in enumerate(info.label_names()):
        words = str(info.index_to_description(index))
        found.append((str(name), words, *words.split(", ")))
    return tuple(found)
