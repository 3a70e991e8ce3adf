"""What a test expects of an error: its class, its code, and the names and figures in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tiedconv.errors import TiedconvError


@contextmanager
def failing(
    error: type[TiedconvError], code: str, *words: str
) -> Iterator[pytest.ExceptionInfo[TiedconvError]]:
    """The block raises this error, with this code, in one line that holds these words."""
    with pytest.raises(error) as caught:
        yield caught
    assert caught.value.code == code
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, (word, message)
