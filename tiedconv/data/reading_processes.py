"""Whether processes that read images can be started from the program that is running."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from tiedconv.errors import first_line

_GUARD = re.compile(r"""__name__\s*[!=]=\s*["']__main__""")


def why_not(data: Dataset[Any]) -> str | None:
    """Why processes can't be started to read a data set; None if they can.

    A new process imports the program's main module again. A script without a main guard would
    start all over there, and what a notebook defines is in no file that could be imported.

    Args:
        data: sent to each process.
    """
    main = sys.modules.get("__main__")
    file: str | None = getattr(main, "__file__", None)
    by_name = getattr(main, "__spec__", None) is not None or getattr(sys, "frozen", False)
    if file is not None and not by_name and not _has_guard(Path(file)):
        return f'{Path(file).name} has no `if __name__ == "__main__":`'
    found = _Search(b"__main__")
    try:
        pickle.Pickler(found).dump(data)
    except Exception as error:  # what can't be pickled raises anything
        return f"the data set can't be sent to another process ({first_line(error)})"
    if found.seen and file is None:
        return "the data set is defined where no other process can import it"
    return None


def _has_guard(file: Path) -> bool:
    try:
        return _GUARD.search(file.read_text("utf-8", errors="replace")) is not None
    except OSError:
        return False  # standard input, for one


class _Search:
    """A file that keeps nothing and knows whether a text was written to it."""

    def __init__(self, text: bytes) -> None:
        self._text, self.seen = text, False

    def write(self, data: Any) -> int:
        self.seen = self.seen or (len(data) <= MOST and self._text in bytes(data))
        return len(data)


MOST = 2**20
"""Bytes of a piece of a pickle, at most, that is searched: longer pieces hold numbers."""
