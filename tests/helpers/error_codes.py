"""Comparing an error by its class and code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tiedconv.errors import TiedconvError


@contextlib.contextmanager
def raises(kind: type[TiedconvError], code: str, *words: str) -> Iterator[None]:
    """A block that must raise this error; `words` are names and figures in its message."""
    with pytest.raises(kind) as caught:
        yield
    assert caught.value.code == code, caught.value
    for word in words:
        assert word in str(caught.value), (word, str(caught.value))
