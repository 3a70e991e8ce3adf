"""What a layout is: a way in which images and their labels are stored."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tiedconv.data.images import Images

VAL_NAMES = ("val", "valid", "validation", "test")
"""Names of the part to evaluate on, the first that exists is used."""

List = Callable[[], Images]
"""Lists the images of a part; called only for parts that are wanted, as it may take a while."""


@dataclass(frozen=True)
class Parts:
    """The parts of a data set.

    Attributes:
        whole: all images, where nothing divides them; then there are no other parts.
        train: the training part, if there is one.
        val: the part to evaluate on, if there is one.
        train_spec: how a user would name the training part alone.
    """

    whole: List | None = None
    train: List | None = None
    val: List | None = None
    train_spec: str = ""


class Layout(ABC):
    """One way of storing images. A new one is one file that holds such a `LAYOUT`.

    Attributes:
        name: of the layout.
        last: whether it takes whatever no other layout takes.
        labels_from: what gives an image its label, in the plural, for messages.
        expected: what the data should look like, a sentence for messages.
        stands_in: whether its images stand in for those that a model will see.
    """

    name: str
    last = False
    labels_from: str
    expected: str
    stands_in = False

    @abstractmethod
    def takes(self, spec: str) -> bool:
        """Whether a user's words mean this layout; looks at names of files at most."""

    @abstractmethod
    def parts(self, spec: str, *, labels: bool) -> Parts:
        """The parts of a data set.

        Args:
            spec: what the user named.
            labels: whether to look for labels; where none are found at all, `Images.labels` is
                None. Without, images are found that have none or unusable ones.

        Raises:
            DataError: the data can't be used; also when a part is listed.
            MissingExtra: an optional package is needed.
        """

    def at_size(self, spec: str, side: int) -> str:
        """The same images for a model that takes them at so many pixels a side.

        What has pixels of its own, as photos have, is resized when it is read, and stays as it is.
        """
        return spec

    def title(self, spec: str) -> str:
        """A short name of the data for a file's history: no path of the user's machine."""
        return Path(spec).name or Path(spec).resolve().name  # of "." the latter


def part_of(name: str) -> str | None:
    """The part that a file belongs to by its name: "train", one of `VAL_NAMES`, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((part for part in ("train", *VAL_NAMES) if part in words), None)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Names for a message, at most five of them."""
    every = list(names)
    shown = ", ".join(every[:most])
    return shown + (f" and {len(every) - most} more" if len(every) > most else "")
