"""A sequence of many short strings in little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np


class Names(Sequence[str]):
    """File names, in about their own bytes and eight more each.

    A million of them as Python's strings would take a hundred megabytes, in each worker
    process. Names that are not valid text, which file systems allow, are kept as they are.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        text = bytearray()
        ends = [0]
        for name in names:
            text += name.encode("utf-8", "surrogateescape")
            ends.append(len(text))
        self._text = bytes(text)
        self._ends: np.ndarray[Any, np.dtype[np.int64]] = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        return self._text[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[at] for at in range(len(self)))
