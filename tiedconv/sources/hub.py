"""The Hugging Face hub: kept out where it must not be asked, given up at once if not there.

Both transformers and timm ask it. Without a network they try again for most of a minute before
they look into the local cache or fail.
"""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hub_offline() -> Iterator[None]:
    """Within it, the hub's client answers from the local cache only, in all threads."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def hub_if_reachable() -> Iterator[str]:
    """Within it, the hub is asked if it can be reached, and else only the local cache.

    Yields:
        Why it can't be reached, or "" if it can.
    """
    reason = _unreachable()
    if not reason:
        yield ""
        return
    with hub_offline():
        yield reason


def _unreachable() -> str:
    from huggingface_hub import constants

    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if urllib.request.getproxies():  # then the proxy finds the host, not this machine
        return ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return f"{host} can't be reached"
    return ""
