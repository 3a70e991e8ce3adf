"""What a test expects of an error: its class, its code, and the names and figures in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tiedconv.errors import TiedconvError


@contextmanager
def raises(
    kind: type[TiedconvError], code: str, *words: str
) -> Iterator[pytest.ExceptionInfo[TiedconvError]]:
    """A block that must raise this error, with this code, in one line that holds these words."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert caught.value.code == code, message
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)
