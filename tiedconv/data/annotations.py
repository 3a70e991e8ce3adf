"""What is to be detected: boxes and classes of a data set's images, in a few arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tiedconv.errors import DataError

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of N images, M in all; those of one image follow on each other.

    Attributes:
        starts: where the objects of each image begin, shape (N + 1,).
        boxes: left, top, width, height in pixels of the image, shape (M, 4).
        classes: for each an index into `names`, shape (M,).
        areas: in pixels, of the outline where there is one, shape (M,).
        iscrowd: 1 for a box around several objects at once, which no single box can find, (M,).
        sizes: width and height of each image, shape (N, 2).
        names: of the classes.
        category_ids: the data set's own ids of the classes, shape (C,).
    """

    starts: Ints
    boxes: Floats
    classes: Ints
    areas: Floats
    iscrowd: Ints
    sizes: Ints
    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def of(self, image: int) -> slice:
        """Where in the arrays the objects of an image are."""
        return slice(int(self.starts[image]), int(self.starts[image + 1]))

    def count(self, images: Ints) -> int:
        """How many objects some of the images have."""
        return int(np.diff(self.starts)[images].sum())

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.boxes)


@dataclass(frozen=True, eq=False)
class Masks:
    """The class of each pixel of N images, as image files.

    Attributes:
        paths: of a file for each image, whose grey values or palette indices are classes.
    """

    paths: tuple[str, ...]

    def of(self, image: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The classes of an image's pixels, `(height, width)`.

        Raises:
            DataError: the file can't be read, or has colours rather than classes.
        """
        from PIL import Image

        path = self.paths[image]
        try:
            with Image.open(path) as opened:
                found = np.asarray(opened)
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"The mask {path} can't be read ({type(error).__name__})",
                "What its image shows is unknown",
                "Repair it, or remove it with its image",
                code="mask-unreadable",
            ) from error
        if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
            raise DataError(
                f"The mask {path} has colours or fractions, not one class a pixel",
                "Which class a colour means is not known",
                "Give grey or palette PNG files whose values are classes, 255 for no class",
                code="mask-without-classes",
            )
        return found.astype(np.int64)
