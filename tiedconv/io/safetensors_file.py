"""Files: written so that nobody ever sees half of one, read as if anybody had sent them.

`SafetensorsFile` reads safetensors files by itself rather than with the library's own reader, which
takes the last of two entries of one name, and maps the file into memory: who writes to it later
changes a model that is long loaded. Here every byte that is used was read once, and checked.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import math
import os
import secrets
import stat
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tiedconv.core.expr import MAX_ELEMENTS, Shape, is_name
from tiedconv.errors import CheckpointError, OutputError

# Far above any model's, far below what could hurt a reader.
MAX_HEADER = 8 * 2**20  # bytes
MAX_VALUES = 200_000  # in a JSON text
MAX_NESTING = 64
MAX_NUMBER = 2**63
MAX_TENSORS = 10_000

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
_AGAIN = "Copy it again from where it came, or convert the model again"


def strict_json(text: str) -> Any:
    """The data of a JSON text that may come from anyone.

    Raises:
        ValueError: it is no JSON, or names a key twice, holds a number that is not finite or a
            text that is not Unicode, or is deeper or larger than any plan.
    """
    if sum(map(text.count, ",[{")) > MAX_VALUES:  # before Python makes objects of them
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels") from None
    level, depth = [data], 0
    while level:
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
        level, depth = _level_below(level), depth + 1
    return data


def json_ready(value: Any) -> Any:
    """Plain data for strict JSON: dataclasses become objects, what is no finite number null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        names += [n for n, kind in vars(type(value)).items() if isinstance(kind, property)]
        return {name: json_ready(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _level_below(level: list[Any]) -> list[Any]:
    """What the values of one level hold, after a look at the texts and numbers among them."""
    below: list[Any] = []
    for value in level:
        kind = type(value)
        if kind is str:
            if not value.isascii():
                value.encode()  # a lone surrogate is a ValueError
        elif kind is list:
            below += value
        elif kind is dict:
            below += value  # the keys
            below += value.values()
        elif kind in (int, float) and not -MAX_NUMBER < value < MAX_NUMBER:
            raise ValueError("it holds a number that is not finite, or too large")
    return below


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it names a key twice")
    return found


def _no_number(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


@dataclasses.dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: Shape
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file, opened once: who replaces it later does not change what is read.

    Nothing is allocated for a tensor before the file's own size has shown that its bytes are there.

    Args:
        path: of the file.

    Raises:
        CheckpointError: there is none, or its head is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if not path.is_file():
            raise CheckpointError(
                f"There is no file {path}",
                hint="Check the path, or make it with tiedconv convert",
            )
        try:
            self._file = path.open("rb", buffering=0)
            self._closing = weakref.finalize(self, self._file.close)
            self.size = os.fstat(self._file.fileno()).st_size
            header = self._head()
        except OSError as error:
            raise self._broken(error.strerror or str(error)) from None
        except ValueError as error:  # of JSON, or of text that is no UTF-8
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
        """A tensor, in memory of its own.

        Raises:
            CheckpointError: the file has become shorter meanwhile, or there is no memory for it.
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
            ) from None
        self._read_into(data.numpy().data, self._start + entry.start)
        if entry.dtype == "BOOL" and count and int(data.max()) > 1:
            raise self._broken(f"the tensor {name} is neither true nor false")
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def close(self) -> None:
        """Close the file now, rather than when nobody has it any more."""
        self._closing()

    def _head(self) -> dict[str, Any]:
        length = int.from_bytes(self._bytes(0, 8), "little")
        self._start = 8 + length
        if length > MAX_HEADER:
            raise ValueError(f"it has {length:,} bytes, and {MAX_HEADER:,} are read at most")
        header = strict_json(self._bytes(8, length).decode())
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.get("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("its metadata are not texts")
        return header

    def _table(self) -> dict[str, _Entry]:
        """The tensors in the order of their bytes, which follow on each other to the file's end."""
        if self._entries is None:
            try:
                self._entries = _entries(self._header, self.size - self._start)
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
            while memory:
                count = self._file.readinto(memory)
                if not count:
                    raise self._broken("it was cut short while it was read")
                memory = memory[count:]

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is no whole safetensors file ({reason})", "It was not used", _AGAIN
        )


def _entries(header: Mapping[str, Any], size: int) -> dict[str, _Entry]:
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has {len(header):,} tensors, and {MAX_TENSORS:,} are read at most")
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
            raise ValueError(f"the tensor {name} has another size than its shape says")
        case {"dtype": str(dtype)} if dtype not in DTYPES:
            raise ValueError(f"the tensor {name} is of the unknown type {dtype[:20]!r}")
    raise ValueError(f"the entry of the tensor {name} is malformed")


def is_shape(sides: list[Any]) -> bool:
    """Whether these are the sides of a tensor that could exist."""
    return (
        len(sides) <= 8
        and all(type(n) is int and n >= 0 for n in sides)
        and math.prod(max(n, 1) for n in sides) <= MAX_ELEMENTS
    )


def check_output(path: Path, *, force: bool = False, option: str = "-o") -> None:
    """Raise OutputError, before any work, if `path` can't be written.

    Args:
        path: the file to be.
        force: an existing file may be replaced.
        option: of the command, by which another place can be chosen.
    """
    _check_place(path, force, option)
    try:
        handle, probe = tempfile.mkstemp(dir=path.parent, prefix=_hidden(path))
    except OSError as error:
        raise OutputError(
            f"{path.parent} can't be written to ({error.strerror})",
            "Nothing was written",
            f"Choose another folder with {option}, or change its permissions",
        ) from None
    try:
        os.close(handle)
    finally:
        os.unlink(probe)


def _check_place(path: Path, force: bool, option: str = "-o") -> None:
    parent = path.parent
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="Name a file, such as model.safetensors")
    if not parent.is_dir():
        raise OutputError(
            f"The folder {parent} does not exist",
            "Nothing can be written there",
            f"Create it, or choose another with {option}",
        )
    if path.exists() and not force:
        raise _exists(path)


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """A safetensors file with the rights of any other file; safetensors makes it private.

    Raises:
        OSError: the disk is full.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, {"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise OSError(str(error)) from None
    path.chmod(stat.S_IMODE(mode))


@contextlib.contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if the block ends without error.

    Readers see the old file or the new one. Of several writers at once each has a temporary file
    of its own, and the last to end wins; without `force`, the first does.

    Raises:
        OutputError: `path` can't be written; the disk is full. What stood there stays.
    """
    _check_place(path, force)
    # The name is known before the file is there, so that an interrupt at any time removes it.
    part = path.with_name(f"{_hidden(path)}{secrets.token_hex(8)}.part")
    _parts.add((os.getpid(), part))
    try:
        # Made by hand, as mkstemp's files are private and results are ordinary files.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        _put_in_place(part, path, force)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{path} can't be written ({reason})",
            "What stood there before is untouched",
            "Free some space, or choose another place with -o",
        ) from None
    finally:
        part.unlink(missing_ok=True)
        _parts.discard((os.getpid(), part))


def stale_temp_files(folder: Path, pattern: str) -> Iterator[Path]:
    """What writers of files of such names have not ended, be it that they run or were killed."""
    files = PurePath(pattern)
    return folder.glob(str(files.with_name(f"{_hidden(files)}*.part")))


# What an interrupt left that came in the very moment in which Python entered or left the block.
_parts: set[tuple[int, Path]] = set()


@atexit.register
def _remove_parts() -> None:
    for process, part in _parts:
        if process == os.getpid():  # a forked process ends while its parent still writes
            part.unlink(missing_ok=True)


def _put_in_place(part: Path, path: Path, force: bool) -> None:
    if not force:
        try:
            os.link(part, path)  # unlike a rename, it fails if another was faster
        except FileExistsError:
            raise _exists(path) from None
        except OSError:  # a file system without links
            if path.exists():
                raise _exists(path) from None
        else:
            return
    os.replace(part, path)


def _hidden(path: PurePath) -> str:
    return f".{path.name[:100]}."


def _exists(path: Path) -> OutputError:
    return OutputError(
        f"{path} exists already", "It was left as it is", "Pass --force to replace it"
    )
