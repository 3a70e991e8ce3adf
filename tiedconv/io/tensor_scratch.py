"""Tensors in a temporary file, so that they take no memory."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiedconv.io.raw import bytes_of, read_all, write_all


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a scratch file: its first byte, dtype and shape."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorScratch:
    """A temporary file of tensors; it is deleted when it is closed or the process ends.

    The file is unbuffered: a mapping writes past a buffer, and reading through one could return
    bytes from before. Every method that touches the file may raise OSError, as for a full disk.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._end = 0

    def __enter__(self) -> TensorScratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk. Tensors from `writable` stay valid."""
        self._file.close()

    def put(self, tensor: Tensor) -> StoredTensor:
        """Append a tensor."""
        # A mapping begins at a multiple of the page size.
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        spot = StoredTensor(start, tensor.dtype, tuple(tensor.shape))
        self._file.seek(start)
        write_all(self._file, bytes_of(tensor))
        self._end = start + spot.size
        return spot

    def read(self, spot: StoredTensor) -> Tensor:
        """A copy of a tensor in memory."""
        tensor = torch.empty(spot.shape, dtype=spot.dtype)
        self._file.seek(spot.start)
        if not read_all(self._file, bytes_of(tensor)):
            raise OSError("a temporary file has become shorter")
        return tensor

    def writable(self, spot: StoredTensor) -> Tensor:
        """A tensor mapped from the file: what is written to it is what `read` returns later."""
        if not spot.size:
            return torch.empty(spot.shape, dtype=spot.dtype)
        mapped = mmap.mmap(self._file.fileno(), spot.size, offset=spot.start)
        return torch.frombuffer(mapped, dtype=spot.dtype).reshape(spot.shape)
