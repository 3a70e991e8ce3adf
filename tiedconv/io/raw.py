"""The bytes of tensors, and unbuffered files that read or write fewer bytes than asked for.

One call of the system moves at most 2 GiB on Linux, and any number of bytes where it is
interrupted.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class RawReader(Protocol):
    """A binary file opened without a buffer, to read."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the beginning of a buffer; the number of bytes, 0 at the end of the file."""


class RawWriter(Protocol):
    """A binary file opened without a buffer, to write."""

    def write(self, data: memoryview, /) -> int | None:
        """Write the beginning of some bytes; their number."""


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; those of a contiguous one can be written to as well."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_all(file: RawReader, buffer: memoryview) -> bool:
    """Fill a buffer from where the file stands; False where the file ends before."""
    while buffer:
        count = file.readinto(buffer)
        if not count:
            return False
        buffer = buffer[count:]
    return True


def write_all(file: RawWriter, data: memoryview) -> None:
    """Write all bytes.

    Raises:
        OSError: the disk is full.
    """
    while data:
        count = file.write(data)
        if not count:
            raise OSError("no bytes could be written")
        data = data[count:]
