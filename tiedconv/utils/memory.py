"""How much memory this process has taken."""

from __future__ import annotations

import sys


def peak_rss() -> int | None:
    """The most bytes that were ever resident; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
