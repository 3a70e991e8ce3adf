"""Which images are held out, and which ones a limit keeps: decided by the seed alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tiedconv.data.annotations import Ints
from tiedconv.data.images import Images
from tiedconv.errors import DataError


def hold_out(images: Images, fraction: float, seed: int) -> tuple[Images, Images]:
    """Splits each class: (the rest, about `fraction` of it, at least one image of two).

    Raises:
        DataError: no class has a second image.
    """
    held = np.zeros(len(images), bool)
    for label, members in _classes(images):
        count = min(len(members) - 1, max(1, round(fraction * len(members))))
        held[members[_shuffled(len(members), seed, label)[:count]]] = True
    if not held.any():
        raise DataError(
            "Every class has one image only" if images.labels is not None else "There is one image",
            "No image can be held out for evaluation",
            "Add images, or a validation part, such as a val/ folder beside train/",
            code="nothing-to-hold-out",
        )
    return images.take(~held), images.take(held)


def limited(images: Images, limit: int | None, seed: int) -> Images:
    """At most `limit` images, as even over the classes as they allow."""
    if limit is None or len(images) <= limit:
        return images
    # Each class is shuffled by itself; then the first of each class come, the second, ...
    rank = np.empty(len(images), np.int64)
    for label, members in _classes(images):
        rank[members[_shuffled(len(members), seed, label)]] = np.arange(len(members))
    labels = np.zeros_like(rank) if images.labels is None else images.labels
    return images.take(np.sort(np.lexsort((labels, rank))[:limit]))


def some_of(images: Images, count: int, seed: int) -> Images:
    """At most `count` of the images, whatever their classes, in their own order."""
    return images.take(np.sort(_shuffled(len(images), seed, 0)[:count]))


def _classes(images: Images) -> Iterator[tuple[int, Ints]]:
    """The label of each class that has images, and the indices of these in their order."""
    if not len(images):
        return
    if images.labels is None:
        yield 0, np.arange(len(images))
        return
    order = np.argsort(images.labels, kind="stable")
    labels, starts = np.unique(images.labels[order], return_index=True)
    yield from zip(labels.tolist(), np.split(order, starts[1:]), strict=True)


def _shuffled(count: int, seed: int, label: int) -> Ints:
    return np.random.default_rng([seed, label]).permutation(count)
