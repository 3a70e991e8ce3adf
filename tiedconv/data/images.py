"""A labelled list of encoded images, wherever they lie: what every layout is read into."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from tiedconv.data.annotations import Ints, Masks, Objects

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
"""File name endings of images, compared in lower case."""

_CONTENTS = 2000  # images that a digest reads

MAX_CLASSES = 1_000_000
"""A larger label is not a class index but something else, such as a time."""


def are_indices(classes: Sequence[str]) -> bool:
    """Whether names of classes are only their own labels: `0`, `1`, `2`, ..."""
    return list(classes) == [str(i) for i in range(len(classes))]


class Store(Protocol):
    """Encoded images that can be reached in any order. It is sent to reading processes.

    What can't be reached raises OSError.
    """

    def name(self, at: int) -> str:
        """What to call an image in a message; for a file, its path."""
        ...

    def open(self, at: int) -> str | Path | BinaryIO:
        """What Pillow can open: a path, or the image's bytes."""
        ...


@dataclass(frozen=True, eq=False)
class Images:
    """Images of a store and their labels; holds no pixels.

    Attributes:
        store: where they are.
        places: which of the store's images these are, shape (N,), int64.
        labels: for each an index into `classes`, shape (N,), int64; None if they have none.
        classes: the class names; empty without labels.
        objects: of all images of the store, where the data set has boxes.
        masks: of all images of the store, where each pixel has a class.
    """

    store: Store
    places: Ints
    labels: Ints | None
    classes: tuple[str, ...]
    objects: Objects | None = None
    masks: Masks | None = None

    @classmethod
    def all_of(
        cls,
        store: Store,
        count: int,
        labels: Ints | None,
        classes: tuple[str, ...],
        objects: Objects | None = None,
        masks: Masks | None = None,
    ) -> Images:
        """All images of a store that holds `count`."""
        return cls(store, np.arange(count, dtype=np.int64), labels, classes, objects, masks)

    @property
    def annotated(self) -> bool:
        """Whether anything says what the images show: labels, boxes or masks."""
        return any(part is not None for part in (self.labels, self.objects, self.masks))

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """What to call one image in a message; for a file, its path."""
        return self.store.name(int(self.places[index]))

    def open(self, index: int) -> str | Path | BinaryIO:
        """What Pillow can open: a path, or the image's bytes.

        Raises:
            OSError: it can't be reached.
        """
        return self.store.open(int(self.places[index]))

    def label(self, index: int) -> int:
        """The label of one image; 0 if there are none."""
        return 0 if self.labels is None else int(self.labels[index])

    def digest(self) -> str:
        """SHA-256 of a data set: which images, their labels, sizes and contents.

        All bytes count of up to 2,000 images; of more, those of 2,000 spread over them, and of
        files the size of each. Where they lie does not count: folders may be moved between two
        parts of a run.
        """
        found = hashlib.sha256(self.places.tobytes())
        for label in () if self.labels is None else (self.labels,):
            found.update(label.tobytes())
        for array in () if self.objects is None else vars(self.objects).values():
            found.update(array.tobytes() if isinstance(array, np.ndarray) else repr(array).encode())
        size = getattr(self.store, "size", None)
        if size is not None:
            sizes = np.array([size(int(place)) for place in self.places], np.int64)
            found.update(sizes.tobytes())
        for index in range(0, len(self), max(1, -(-len(self) // _CONTENTS))):
            name = "/".join(Path(self.name(index)).parts[-2:])
            found.update(os.fsencode(name))
            found.update(hashlib.sha256(self._bytes(index)).digest())
        return found.hexdigest()

    def _bytes(self, index: int) -> bytes:
        """The encoded image; empty if it can't be read, which training says by itself."""
        try:
            file = self.open(index)
            return Path(file).read_bytes() if isinstance(file, str | Path) else file.read()
        except (OSError, ValueError):
            return b""

    def take(self, which: np.ndarray[Any, Any]) -> Images:
        """Some of them: by their indices, or by one truth value for each."""
        labels = None if self.labels is None else self.labels[which]
        return replace(self, places=self.places[which], labels=labels)

    def unlabelled(self) -> Images:
        """The same images without their labels."""
        return replace(self, labels=None, classes=())
