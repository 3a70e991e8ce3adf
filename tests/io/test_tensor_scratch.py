"""Tensors in a temporary file: what was written last is read, whatever the file's buffer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import files_of

from tiedconv.io import raw
from tiedconv.io.tensor_scratch import TensorScratch

LARGE_BUFFER = 2**20


@pytest.fixture
def large_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are buffered by 1 MiB unless another size is asked for, as on some file systems."""
    original: Callable[..., Any] = tempfile.TemporaryFile

    def buffered(*args: Any, **options: Any) -> Any:
        return original(*args, **{"buffering": LARGE_BUFFER, **options})

    monkeypatch.setattr(tempfile, "TemporaryFile", buffered)


def test_tensors_are_read_as_they_were_put(tmp_path: Path) -> None:
    with TensorScratch(tmp_path) as scratch:
        tensors = [torch.randn(3, 5), torch.arange(7), torch.tensor(2.5), torch.zeros(0, 4)]
        spots = [scratch.put(t) for t in tensors]
        assert not files_of(tmp_path)
        for tensor, spot in zip(tensors, spots, strict=True):
            assert torch.equal(scratch.read(spot), tensor)
        scratch.writable(spots[0]).t()[1:2].mul_(2)
        tensors[0][:, 1] *= 2
        assert torch.equal(scratch.read(spots[0]), tensors[0])
        view = scratch.writable(spots[1])
    assert torch.equal(view, tensors[1])
    with pytest.raises(ValueError, match="closed"):
        scratch.read(spots[0])


@pytest.mark.usefixtures("large_buffer")
@pytest.mark.parametrize("count", [1, 10, 900, 5_000, 100_000, 1_000_000])
def test_what_a_mapping_wrote_is_read(count: int, tmp_path: Path) -> None:
    """A buffer would still hold what the first read left in it."""
    with TensorScratch(tmp_path) as scratch:
        first, second = scratch.put(torch.zeros(count)), scratch.put(torch.ones(count))
        for spot, value in ((second, 1.0), (first, 0.0)):
            assert torch.equal(scratch.read(spot), torch.full((count,), value))
        scratch.writable(first).fill_(5)
        scratch.writable(second).fill_(7)
        assert torch.equal(scratch.read(first), torch.full((count,), 5.0))
        assert torch.equal(scratch.read(second), torch.full((count,), 7.0))


class Slow:
    """A file that moves three bytes at a time."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.at = 0

    def readinto(self, buffer: memoryview) -> int:
        part = self.content[self.at : self.at + min(3, len(buffer))]
        buffer[: len(part)] = part
        self.at += len(part)
        return len(part)

    def write(self, data: memoryview) -> int:
        self.content += data[:3]
        return min(3, len(data))


def test_short_reads_and_writes_are_continued() -> None:
    tensor = torch.arange(5, dtype=torch.int32)
    file = Slow()
    raw.write_all(file, raw.bytes_of(tensor))
    found = torch.zeros_like(tensor)
    assert raw.read_all(file, raw.bytes_of(found))
    assert torch.equal(found, tensor)
    assert not raw.read_all(file, raw.bytes_of(found))  # the file has ended


def test_a_file_that_takes_no_bytes_is_an_error() -> None:
    class Full(Slow):
        def write(self, data: memoryview) -> int:
            return 0

    with pytest.raises(OSError, match="no bytes"):
        raw.write_all(Full(), raw.bytes_of(torch.zeros(2)))
