"""The one reader and the one writer of safetensors files.

`SafetensorsFile` does not use the library's reader, which takes the last of two entries of one
name, and maps the file into memory: whoever writes to it later changes a model that is loaded. Here
each byte that is used was read once, and checked. `write_tensors` holds one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialized
from torch import Tensor

from tiedconv.core.expr import MAX_ELEMENTS, Shape, is_name
from tiedconv.errors import CheckpointError
from tiedconv.io.json_text import MAX_VALUES, strict_json
from tiedconv.io.raw import bytes_of, read_all, write_all

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
"""dtypes by safetensors' names for them."""

Form = tuple[torch.dtype, Shape]
"""dtype and shape of a tensor."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a reader accepts, far above any model and far below what could harm it.

    Args:
        header: bytes of the header.
        tensors: their number.
        values: in the header's JSON text.
    """

    header: int = 8 * 2**20
    tensors: int = 10_000
    values: int = MAX_VALUES


COMPACT = Limits()
FOREIGN = Limits(header=100_000_000, tensors=1_000_000, values=20_000_000)
"""For files of others, such as plain weights: the limits of the safetensors library."""

_AGAIN = "Copy it again from its origin, or convert the model again"


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: Shape
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file, opened once: replacing it later does not change what is read.

    No memory is allocated for a tensor before the file's size shows that its bytes exist.

    Args:
        path: of the file.
        limits: of its header.

    Raises:
        CheckpointError: it does not exist, or its header is damaged.
    """

    def __init__(self, path: Path, limits: Limits = COMPACT) -> None:
        self.path = path
        self._limits = limits
        self._lock = threading.Lock()
        if not path.is_file():
            raise CheckpointError(
                f"There is no file {path}",
                hint="Check the path, or make it with tiedconv convert",
                code="file-not-found",
            )
        try:
            self._file = path.open("rb", buffering=0)
            self._closing = weakref.finalize(self, self._file.close)
            self.size = os.fstat(self._file.fileno()).st_size
            header = self._head()
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from None
        except ValueError as error:  # of JSON, or of text that is not UTF-8
            raise self._broken(f"its header is damaged: {error}") from None
        self.metadata: Mapping[str, str] = header.pop("__metadata__", {})
        self._header = header
        self._entries: dict[str, _Entry] | None = None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name to shape, in the order of the bytes."""
        return {name: entry.shape for name, entry in self._table().items()}

    @property
    def dtypes(self) -> dict[str, str]:
        """Name to safetensors' name of the dtype."""
        return {name: entry.dtype for name, entry in self._table().items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor in memory that nothing else uses.

        Raises:
            CheckpointError: the file has become shorter, or there is no memory for the tensor.
        """
        entry = self._table()[name]
        count = entry.stop - entry.start
        try:
            data = torch.empty(count, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            raise CheckpointError(
                f"{self.path}: there is no memory for the {count:,} bytes of the tensor {name}",
                "It was not loaded",
                "Load it where there is more memory",
                code="out-of-memory",
            ) from None
        self._read_into(data.numpy().data, self._start + entry.start)
        if entry.dtype == "BOOL" and count and int(data.max()) > 1:
            raise self._broken(f"the tensor {name} has values that are neither true nor false")
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        """Close the file now, rather than when this object is deleted."""
        self._closing()

    def _head(self) -> dict[str, Any]:
        length = int.from_bytes(self._bytes(0, 8), "little")
        self._start = 8 + length
        if length > self._limits.header:
            raise ValueError(f"it has {length:,} bytes, more than {self._limits.header:,}")
        header = strict_json(self._bytes(8, length).decode(), self._limits.values)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata is not text")
        return header

    def _table(self) -> dict[str, _Entry]:
        """The tensors in the order of their bytes, which fill the file without gaps."""
        if self._entries is None:
            try:
                self._entries = _entries(
                    self._header, self.size - self._start, self._limits.tensors
                )
            except ValueError as error:
                raise self._broken(str(error)) from None
        return self._entries

    def _bytes(self, start: int, count: int) -> bytearray:
        if start + count > self.size:
            raise ValueError("the file ends within it")
        data = bytearray(count)
        self._read_into(memoryview(data), start)
        return data

    def _read_into(self, memory: memoryview, start: int) -> None:
        with self._lock:
            self._file.seek(start)
            if not read_all(self._file, memory):
                raise self._broken("it was truncated while it was read")

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a complete safetensors file ({reason})",
            "It was not used",
            _AGAIN,
            code="file-damaged",
        )


def _entries(header: Mapping[str, Any], size: int, most: int) -> dict[str, _Entry]:
    if len(header) > most:
        raise ValueError(f"it has {len(header):,} tensors, more than {most:,}")
    found = {name: _entry(name, data) for name, data in header.items()}
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
    at = 0
    for name, entry in ordered:
        if entry.start != at:
            raise ValueError(f"the tensor {name} does not begin where the one before it ends")
        at = entry.stop
    if at != size:
        raise ValueError(f"its tensors have {at:,} bytes, and the file has {size:,} for them")
    return dict(ordered)


def _entry(name: str, data: Any) -> _Entry:
    if not is_name(name):
        raise ValueError("a tensor's name is empty, too long or not printable")
    match data:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, stop]} if (
            len(data) == 3
            and dtype in DTYPES
            and is_shape(shape)
            and all(type(n) is int and n >= 0 for n in (start, stop))
        ):
            if stop - start == math.prod(shape) * DTYPES[dtype].itemsize:
                return _Entry(dtype, tuple(shape), start, stop)
            raise ValueError(f"the tensor {name} has a size that does not match its shape")
        case {"dtype": str(dtype)} if dtype not in DTYPES:
            raise ValueError(f"the tensor {name} is of the unknown type {dtype[:20]!r}")
    raise ValueError(f"the entry of the tensor {name} is malformed")


def is_shape(sides: list[Any]) -> bool:
    """Whether these are the dimensions of a tensor that could exist."""
    return (
        len(sides) <= 8
        and all(type(n) is int and n >= 0 for n in sides)
        and math.prod(max(n, 1) for n in sides) <= MAX_ELEMENTS
    )


def write_tensors(
    path: Path,
    forms: Mapping[str, Form],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, with one tensor in memory at a time.

    The same tensors and metadata give the same bytes.

    Args:
        path: of the file, which is overwritten.
        forms: name to dtype and shape.
        tensor: from a name to the tensor, of that form.
        metadata: of the file, written in the order of its keys.

    Raises:
        OSError: the disk is full.
    """
    head, names, _ = _head_of(forms, metadata)
    with path.open("wb", buffering=0) as file:
        write_all(file, memoryview(head))
        for name in names:
            value = tensor(name).detach().cpu()
            assert (value.dtype, tuple(value.shape)) == forms[name]
            write_all(file, bytes_of(value))


def size_of_tensors(forms: Mapping[str, Form], metadata: Mapping[str, str]) -> int:
    """The bytes that `write_tensors` writes, given the same."""
    head, _, end = _head_of(forms, metadata)
    return len(head) + end


def _head_of(
    forms: Mapping[str, Form], metadata: Mapping[str, str]
) -> tuple[bytes, list[str], int]:
    """What a file begins with, the names in the order of their tensors, and their bytes in all."""
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    end = 0
    for name, entry in _layout(forms).items():
        start, end = end, end + torch.Size(forms[name][1]).numel() * forms[name][0].itemsize
        header[name] = {**entry, "shape": list(forms[name][1]), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text, list(header)[1:], end


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Write tensors in memory to a safetensors file, as `write_tensors` does."""
    write_tensors(path, forms_of(tensors), tensors.__getitem__, metadata or {})


def forms_of(tensors: Mapping[str, Tensor]) -> dict[str, Form]:
    """The dtype and shape of each tensor."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _layout(forms: Mapping[str, Form]) -> dict[str, Any]:
    """What safetensors writes for empty tensors: its names of dtypes, in its order of tensors."""
    data = serialized({name: torch.empty(0, dtype=dtype) for name, (dtype, _) in forms.items()})
    length = int.from_bytes(data[:8], "little")
    entries: dict[str, Any] = json.loads(data[8 : 8 + length])
    return entries
