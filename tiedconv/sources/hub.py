"""The Hugging Face hub: not contacted where it must not be, nor if it is unreachable.

Both transformers and timm contact it. Without a network they retry for most of a minute before
they look into the local cache or fail.
"""

from __future__ import annotations

import socket
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_users: list[object] = []
_before = False


@contextmanager
def hub_offline() -> Iterator[None]:
    """Within it, the hub's client uses the local cache only, in all threads.

    The client has no setting for one call or thread. So the first of several threads sets it and
    the last restores it, in whatever order they end.
    """
    from huggingface_hub import constants

    global _before
    with _lock:
        if not _users:
            _before = constants.HF_HUB_OFFLINE
        user = object()
        _users.append(user)
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        with _lock:
            _users.remove(user)
            if not _users:
                constants.HF_HUB_OFFLINE = _before


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
