"""Batches of samples of one shape each, where the samples of a data set differ in shape.

A data set says so by an attribute `groups`: a number for each sample, the same for samples of one
shape. Without it all have one shape, and batches are as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

Indices = np.ndarray[Any, np.dtype[np.int64]]


def numbered(shapes: Sequence[Hashable]) -> Indices | None:
    """A number for each sample, that of the first with its shape; None if all have one shape."""
    first: dict[Hashable, int] = {}
    found = [first.setdefault(shape, len(first)) for shape in shapes]
    return np.array(found, np.int64) if len(first) > 1 else None


def consecutive(order: Indices, size: int, groups: Indices | None) -> list[Indices]:
    """Samples in their order, at most `size` a batch; with groups, one group after the other."""
    return [
        part[start : start + size]
        for part in _of_each_group(order, groups)
        for start in range(0, len(part), size)
    ]


def even(
    order: Indices, size: int, groups: Indices | None, random: np.random.Generator
) -> list[Indices]:
    """Batches of nearly equal sizes, at most `size` each.

    With groups, batches of each are drawn into one another, by `random`.
    """
    found = [
        batch
        for part in _of_each_group(order, groups)
        for batch in np.array_split(part, -(-len(part) // size))
    ]
    if groups is None:
        return found
    return [found[i] for i in random.permutation(len(found))]


def _of_each_group(order: Indices, groups: Indices | None) -> list[Indices]:
    if groups is None:
        return [order] if len(order) else []
    own = groups[order]
    return [order[own == group] for group in np.unique(own)]
