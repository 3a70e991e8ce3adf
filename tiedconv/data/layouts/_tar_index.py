"""Where the samples of tar shards lie: read from the headers once, then kept in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tarfile
import time
import zipfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from tiedconv.data.annotations import Ints
from tiedconv.data.images import MAX_CLASSES, SUFFIXES
from tiedconv.data.layouts._base import listed
from tiedconv.errors import DataError

BLOCK = tarfile.BLOCKSIZE
_ENDINGS = tuple(suffix[1:] for suffix in SUFFIXES)
_LABEL_BYTES = 1 << 20
_VERSION = 2
"""Of the cached file; another number makes older ones unused."""
_HASH = 32  # bytes of the SHA-256 that a kept index begins with
_LOG_SECONDS = 5.0

_log = logging.getLogger(__name__)


def index_of(paths: Sequence[str], labels: bool, expected: str) -> Ints:
    """Every sample of some shards, in their order.

    Args:
        paths: of the shards.
        labels: whether to read labels.
        expected: what shards should look like, for messages.

    Returns:
        shape (4, samples): index of the shard, where the image begins and how long it is in
        bytes, and its label, -1 for all if there are none.

    Raises:
        DataError: a shard that is damaged or whose samples can't be used.
    """
    place = _cache_file(paths, labels)
    with contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        data = place.read_bytes()
        if hashlib.sha256(data[_HASH:]).digest() == data[:_HASH]:
            kept: Ints = np.load(io.BytesIO(data[_HASH:]), allow_pickle=False)
            if _may_be_of(kept, paths):
                return kept
    index = _read(paths, labels, expected)
    with contextlib.suppress(OSError):  # without a cache it is read again each time
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = place.with_name(f"{place.name}.{os.getpid()}")
        buffer = io.BytesIO()
        np.save(buffer, index, allow_pickle=False)
        draft.write_bytes(hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
        os.replace(draft, place)
    return index


def _may_be_of(index: Ints, paths: Sequence[str]) -> bool:
    """Whether a kept index could be of these shards: a damaged one is read again."""
    if index.dtype != np.int64 or index.ndim != 2 or len(index) != 4 or not index.size:
        return False
    number, start, size, _ = index
    if number.min() < 0 or number.max() >= len(paths) or start.min() < 0 or size.min() < 0:
        return False
    sizes = np.array([os.path.getsize(path) for path in paths], np.int64)
    return bool((start + size <= sizes[number]).all())


def _cache_file(paths: Sequence[str], labels: bool) -> Path:
    """A file in the user's cache, whose name changes when any of the shards does."""
    known = [(os.path.realpath(p), (at := os.stat(p)).st_size, at.st_mtime_ns) for p in paths]
    key = hashlib.sha256(repr((_VERSION, labels, known)).encode("utf-8", "surrogateescape"))
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root, "tiedconv", "shards", f"{key.hexdigest()[:32]}.npy")


def _read(paths: Sequence[str], labels: bool, expected: str) -> Ints:
    columns = [array("q") for _ in range(4)]
    known = columns[3]
    logged = time.monotonic()
    for number, path in enumerate(paths):
        if time.monotonic() - logged >= _LOG_SECONDS:
            logged = time.monotonic()
            _log.info(
                "Reading where the images lie, once: shard %d of %d", number + 1, len(paths)
            )  # fmt: skip
        for key, start, size, label in _samples(path, labels, expected):
            if known and (known[-1] < 0) != (label < 0):
                raise DataError(
                    f"The sample {key} of {path} has {'no' if label < 0 else 'a'} label, unlike "
                    "the samples before it",
                    "Labels are either for all or for none",
                    "Add KEY.cls to every sample, or leave the sample out",
                    code="mixed-labels",
                )
            for column, value in zip(columns, (number, start, size, label), strict=True):
                column.append(value)
    if not known:
        raise DataError(f"The shard {paths[0]} holds no samples", "", expected, code="no-images")
    return np.array(columns, np.int64)


def _samples(path: str, labels: bool, expected: str) -> Iterator[tuple[str, int, int, int]]:
    """For each sample of a shard its key, where its image begins, how long it is, its label."""
    from webdataset.tariterators import group_by_keys

    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for sample in group_by_keys(_members(path, tar)):
                key = sample["__key__"]
                if key in seen:
                    raise DataError(
                        f"The key {key} comes again later in {path}",
                        "Files of one sample must lie together, and keys must differ",
                        "Write the shard again, its files sorted by name (tar --sort=name)",
                        code="duplicate-key",
                    )
                seen.add(key)
                start, size = _image_of(path, key, sample, expected)
                yield key, start, size, _label_of(path, tar, sample) if labels else -1
    except ValueError as error:
        what, _, reason = str(error.args[0] if error.args else error).partition(":")
        if "duplicate" not in reason:  # as `group_by_keys` says it
            raise _damaged(path, str(error)) from error
        raise DataError(
            f"The file {what} is in {path} twice",
            "One of the two would be left out",
            "Write the shard again with different keys",
            code="duplicate-key",
        ) from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _members(path: str, tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The files of a shard as `group_by_keys` wants them, with places in place of bytes."""
    file = _file_of(tar)
    length = os.fstat(file.fileno()).st_size
    at = 0
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:  # cut between two files: it would look like a short shard
            raise _damaged(path, f"it ends without a mark at byte {at:,}")
        name, size, start = _plain(header, at) or ("", 0, 0)
        if not name:
            if (skipped := _needless(header, file)) is not None:
                at += skipped
                continue
            # Long names, large files and all that is rare: as slow and right as the library is.
            file.seek(at)
            tar.offset = at
            member = tarfile.TarInfo.fromtarfile(tar)
            if member.issparse():
                raise _damaged(path, f"{member.name} is a sparse file")
            name = member.name if member.isreg() else "__"
            size, start, at = member.size, member.offset_data, tar.offset
        else:
            at = start + _padded(size)
        if name.startswith("__"):
            continue
        if start + size > length:
            raise _damaged(path, f"{name} should end at byte {start + size:,} of {length:,}")
        yield {"fname": name, "data": (start, size), "__url__": path}


def _plain(header: bytes, at: int) -> tuple[str, int, int] | None:
    """Name, size and place of a file whose header says all; None for any other header.

    The library takes ten times as long, which for a million images is minutes.
    """
    if header[156] not in b"0" or header[257:262] != b"ustar" or header[345]:
        return None
    size = _octal(header[124:136])
    if size is None or not _is_sound(header):
        return None
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape"), size, at + BLOCK


def _needless(header: bytes, file: BinaryIO) -> int | None:
    """The length of an extended header that changes neither name nor size; None for others."""
    size = _octal(header[124:136])
    if header[156] not in b"x" or size is None or size > _LABEL_BYTES or not _is_sound(header):
        return None
    body = file.read(size)
    matters = len(body) < size or any(word in body for word in (b"path=", b"size=", b"GNU.sparse"))
    return None if matters else BLOCK + _padded(size)


def _is_sound(header: bytes) -> bool:
    """Whether the header's sum is what it says; the sum's own eight bytes count as spaces."""
    return _octal(header[148:156]) == sum(header) - sum(header[148:156]) + 256


def _octal(field: bytes) -> int | None:
    digits = field.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _image_of(path: str, key: str, sample: Mapping[str, Any], expected: str) -> tuple[int, int]:
    kinds = [kind for kind in _ENDINGS if kind in sample]
    if len(kinds) != 1:
        others = [kind for kind in sample if not kind.startswith("__")]
        what = "several images" if kinds else "no image"
        raise DataError(
            f"The sample {key} of {path} has {what}: its files end in {listed(kinds or others)}",
            "A key ends at the first dot of a file's name",
            expected,
            code="invalid-sample",
        )
    start, size = sample[kinds[0]]
    return start, size


def _label_of(path: str, tar: tarfile.TarFile, sample: Mapping[str, Any]) -> int:
    """The label of a sample; -1 if it has none."""
    kind = "cls" if "cls" in sample else "json"
    if kind not in sample:
        return -1
    start, size = sample[kind]
    file = _file_of(tar)
    file.seek(start)
    text = file.read(min(size, _LABEL_BYTES))
    try:
        found = json.loads(text)
        if kind == "json":
            if not isinstance(found, dict) or "label" not in found:
                return -1
            found = found["label"]
        if type(found) is int and 0 <= found < MAX_CLASSES:
            return found
    except (ValueError, RecursionError):
        found = text[:40].decode("utf-8", "replace")
    raise DataError(
        f"The label of the sample {sample['__key__']} of {path} is {found!r}",
        "A label must be a class index",
        f"Write labels as whole numbers from 0 to {MAX_CLASSES - 1:,}",
        code="invalid-label",
    )


def _file_of(tar: tarfile.TarFile) -> BinaryIO:
    assert tar.fileobj is not None  # it was opened by its path
    return cast(BinaryIO, tar.fileobj)


def _damaged(path: str, reason: str) -> DataError:
    return DataError(
        f"The shard {path} can't be read: {reason}",
        "It is damaged or was cut short",
        "Copy or write it again, as a plain .tar",
        code="shard-damaged",
    )
