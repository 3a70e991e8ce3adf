"""Memory that this process uses."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tiedconv.utils.memory import peak_rss

_STATM = Path("/proc/self/statm")


def memory_in_use() -> int | None:
    """Bytes: the most that CUDA tensors took so far, else what is resident; None if not known.

    Where the system reports no present figure, it is the most that was ever resident.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices = range(torch.cuda.device_count())
        return sum(torch.cuda.max_memory_allocated(device) for device in devices)
    try:
        return int(_STATM.read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return peak_rss()
