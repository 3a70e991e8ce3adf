"""Tensors on disk for the time of a work, so that they take no memory."""

from __future__ import annotations

import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


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
    """A file without a name that holds tensors; it is gone when it is closed, or the process ends.

    Every method that touches the file may raise OSError, such as for a full disk.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._end = 0

    def __enter__(self) -> TensorScratch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the disk. Tensors from `writable` stay valid."""
        self._file.close()

    def put(self, tensor: Tensor) -> StoredTensor:
        """Write a tensor down."""
        # A mapping begins at a multiple of the page size.
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        spot = StoredTensor(start, tensor.dtype, tuple(tensor.shape))
        self._file.seek(start)
        self._file.write(_bytes_of(tensor))
        self._file.flush()
        self._end = start + spot.size
        return spot

    def read(self, spot: StoredTensor) -> Tensor:
        """A tensor, in memory of its own."""
        tensor = torch.empty(spot.shape, dtype=spot.dtype)
        self._file.seek(spot.start)
        if self._file.readinto(_bytes_of(tensor)) != spot.size:
            raise OSError("a temporary file has become shorter")
        return tensor

    def writable(self, spot: StoredTensor) -> Tensor:
        """A tensor whose memory is the file's: what is written to it is read later."""
        if not spot.size:
            return torch.empty(spot.shape, dtype=spot.dtype)
        mapped = mmap.mmap(self._file.fileno(), spot.size, offset=spot.start)
        return torch.frombuffer(mapped, dtype=spot.dtype).reshape(spot.shape)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of a contiguous one, to write to as well."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
