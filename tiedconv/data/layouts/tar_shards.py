"""Images in tar shards, as the `webdataset` package writes them.

Members of one sample follow each other and share their name up to its first dot: `0001.jpg` with
`0001.cls` (the label as text) or `0001.json` (with "label"). The package reads shards as a stream.
Here a shard's headers are read once for the place of each image, and then images in any order:
so the order of training depends on its seed alone, and a run goes on where it was interrupted.
What makes a sample is still the package's to say.

Nothing is ever unpacked to disk, and members of other kinds (pickles above all) are not looked at.
"""

from __future__ import annotations

import glob
import io
import json
import os
import tarfile
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tiedconv.data.images import SUFFIXES, Images, Ints
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, listed, part_of
from tiedconv.errors import DataError, MissingExtra

_ENDINGS = tuple(suffix[1:] for suffix in SUFFIXES)
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CLASS_FILES = ("classes.txt", "classnames.txt")
_OPEN = 64
"""Shards that a process keeps open."""
_LABEL_BYTES = 1 << 20
_BLOCK = tarfile.BLOCKSIZE


class TarShards(Layout):
    """Tar files with images and labels."""

    name = "shards"
    labels_from = ".cls or .json members"
    expected = (
        "Expected shards such as DIR/train-000000.tar and DIR/val-000000.tar (or DIR/train/*.tar "
        "and DIR/val/*.tar) whose samples are KEY.jpg with KEY.cls or KEY.json"
    )

    def takes(self, spec: str) -> bool:
        return spec.endswith((".tar", *_PACKED)) or bool(_shards_in(Path(spec)))

    def parts(self, spec: str, *, labels: bool) -> Parts:
        found = _shards_in(Path(spec)) or {"": _expanded(spec)}
        listing = {name: partial(_listed, paths, labels) for name, paths in found.items()}
        if len(listing) == 1 and os.path.splitext(spec)[1]:
            return Parts(whole=next(iter(listing.values())))  # these shards were named, no others
        train = listing.pop("train", None)
        whole = listing.pop("", None)
        if train is None and not listing:
            return Parts(whole=whole)
        # Shards of no known part, beside others that are of one, are left alone.
        val = next((listing[name] for name in VAL_NAMES if name in listing), None)
        first = found["train"][0] if train is not None else ""
        return Parts(train=train, val=val, train_spec=f"its training shards ({first}, ...)")


LAYOUT = TarShards()


class _Members:
    """Images inside shards: a store.

    Args:
        paths: of the shards.
        shard: for each image the index of its shard.
        start: where its bytes begin.
        size: how many they are.
    """

    def __init__(self, paths: Sequence[str], shard: Ints, start: Ints, size: Ints) -> None:
        self._paths = tuple(paths)
        self._shard = shard.astype(np.uint32)
        self._start = start
        self._size = size.astype(np.uint32)
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def name(self, at: int) -> str:
        path = self._paths[self._shard[at]]
        start = int(self._start[at])
        try:
            header = self._read(at, start - _BLOCK, _BLOCK)
            return f"{path}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (OSError, tarfile.TarError):
            return f"{path}, byte {start}"

    def open(self, at: int) -> BinaryIO:
        return io.BytesIO(self._read(at, int(self._start[at]), int(self._size[at])))

    def _read(self, at: int, start: int, size: int) -> bytes:
        file = self._file(int(self._shard[at]))
        file.seek(start)
        data = file.read(size)
        if len(data) < size:
            raise OSError(f"the shard has fewer than {start + size:,} bytes")
        return data

    def _file(self, shard: int) -> BinaryIO:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) >= _OPEN:
                self._open.popitem(last=False)[1].close()
            file = open(self._paths[shard], "rb", buffering=0)
        self._open[shard] = file  # the last used comes last
        return file


def _shards_in(folder: Path) -> dict[str, list[str]]:
    """The shards of a folder by part: "train", "val", ... or "" where names tell none.

    Class folders beside them make it a folder of images, in which a stray tar file lies.
    """
    if not folder.is_dir():
        return {}
    found: dict[str, list[str]] = {}
    for part in ("train", *VAL_NAMES):
        found[part] = sorted(map(str, (folder / part).glob("*.tar")))
    if not any(found.values()):
        shards = sorted(map(str, folder.glob("*.tar")))
        if any(entry.is_dir() and entry.name[0] not in "._" for entry in folder.iterdir()):
            return {}
        found = _by_part(shards)
    return {part: paths for part, paths in found.items() if paths}


def _by_part(shards: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in shards:
        found.setdefault(part_of(Path(path).stem) or "", []).append(path)
    return found


def _expanded(spec: str) -> list[str]:
    """The shards that a pattern names: braces as the package expands them, or `*`.

    Raises:
        DataError: there are none, some are missing, or they lie where they can't be read.
    """
    if spec.endswith(_PACKED):
        raise DataError(
            f"The shards {spec} are compressed",
            "Their images can't be reached one by one",
            "Decompress them to .tar; images are compressed already",
        )
    if "://" in spec or spec.startswith("pipe:"):
        raise DataError(
            f"The shards {spec} are not files", "", "Copy them to a disk, and give the path"
        )
    if "{" in spec:
        _webdataset()
        from webdataset.shardlists import expand_urls

        names = list(expand_urls(spec))
    else:
        names = [spec]
    paths = [path for name in names for path in (sorted(glob.glob(name)) or [name])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"There is no shard {listed(missing)}",
            f"{len(missing):,} of {len(paths):,} are missing" if len(paths) > 1 else "",
            LAYOUT.expected,
        )
    return paths


def _listed(paths: Sequence[str], labels: bool) -> Images:
    """All samples of some shards, in the order of shards and members."""
    _webdataset()
    starts, sizes, shards, found = array("q"), array("q"), array("q"), array("q")
    for number, path in enumerate(paths):
        for key, start, size, label in _samples(path, labels):
            if found and (found[-1] < 0) != (label < 0):
                _refuse_partly_labelled(path, key, label < 0)
            starts.append(start)
            sizes.append(size)
            shards.append(number)
            found.append(label)
    if not found:
        raise DataError(f"The shard {paths[0]} holds no samples", "", LAYOUT.expected)
    made = _Members(paths, *(np.frombuffer(a, np.int64) for a in (shards, starts, sizes)))
    if found[0] < 0:
        return Images.all_of(made, len(found), None, ())
    every = np.frombuffer(found, np.int64)
    return Images.all_of(made, len(found), every, _class_names(paths[0], int(every.max()) + 1))


def _samples(path: str, labels: bool) -> Iterator[tuple[str, int, int, int]]:
    """For each sample of a shard its key, where its image begins, how long it is, its label.

    A label is -1 where there is none, or where none is wanted.
    """
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
                        "Write the shard anew, its files sorted by name (tar --sort=name)",
                    )
                seen.add(key)
                start, size = _image_of(path, key, sample)
                yield key, start, size, _label_of(path, tar, sample) if labels else -1
    except ValueError as error:  # of `group_by_keys`
        what = str(error.args[0] if error.args else error).split(":")[0]
        raise DataError(
            f"The file {what} is in {path} twice",
            "One of the two would be left out",
            "Write the shard anew with different keys",
        ) from error
    except (tarfile.TarError, OSError, EOFError) as error:
        raise _damaged(path, str(error)) from error


def _members(path: str, tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The files of a shard as `group_by_keys` wants them, with places in place of bytes."""
    while (member := tar.next()) is not None:
        tar.members = []  # otherwise all of them are kept
        if member.issparse():
            raise _damaged(path, f"{member.name} is a sparse file")
        if member.isreg() and not member.name.startswith("__"):
            place = (member.offset_data, member.size)
            yield {"fname": member.name, "data": place, "__url__": path}
    # A shard that is cut between two files, or has a bad header, would look like a short one.
    file: Any = tar.fileobj
    file.seek(tar.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise _damaged(path, f"no further file and no end mark at byte {tar.offset:,}")


def _image_of(path: str, key: str, sample: Mapping[str, Any]) -> tuple[int, int]:
    kinds = [kind for kind in _ENDINGS if kind in sample]
    if len(kinds) != 1:
        has = f"has no image: only {listed(k for k in sample if not k.startswith('__'))}"
        raise DataError(
            f"The sample {key} of {path} {f'has several images: {kinds}' if kinds else has}",
            "A key ends at the first dot of a file's name",
            f"{LAYOUT.expected}",
        )
    start, size = sample[kinds[0]]
    return start, size


def _label_of(path: str, tar: tarfile.TarFile, sample: Mapping[str, Any]) -> int:
    kind = "cls" if "cls" in sample else "json"
    if kind not in sample:
        return -1
    start, size = sample[kind]
    file: Any = tar.fileobj
    file.seek(start)
    text = file.read(min(size, _LABEL_BYTES))
    try:
        found = json.loads(text)
        if kind == "json":
            if not isinstance(found, dict) or "label" not in found:
                return -1
            found = found["label"]
        if type(found) is int and 0 <= found < 2**31:
            return found
    except ValueError:
        found = text[:40].decode("utf-8", "replace")
    raise DataError(
        f"The label of the sample {sample['__key__']} of {path} is {found!r}",
        "It is no class number",
        "Write labels as whole numbers from 0 on",
    )


def _refuse_partly_labelled(path: str, key: str, missing: bool) -> None:
    state = "no label, unlike the samples" if missing else "a label, unlike the samples"
    raise DataError(
        f"The sample {key} of {path} has {state} before it",
        "Labels are either for all or for none",
        "Add KEY.cls to every sample, or leave the sample out",
    )


def _damaged(path: str, reason: str) -> DataError:
    return DataError(
        f"The shard {path} can't be read: {reason}",
        "It is damaged or was cut short",
        "Copy or write it again, as a plain .tar",
    )


def _class_names(shard: str, count: int) -> tuple[str, ...]:
    """Names from a `classes.txt` beside the shards or one folder above, else numbers."""
    folder = Path(shard).resolve().parent
    for file in (where / name for where in (folder, folder.parent) for name in _CLASS_FILES):
        if not file.is_file():
            continue
        names = tuple(file.read_text("utf-8", "replace").split("\n"))
        names = tuple(name.strip() for name in names if name.strip())
        if len(names) < count:
            raise DataError(
                f"{file} names {len(names)} classes, and the shards have labels up to {count - 1}",
                "Some classes would have no name",
                "Put one name in each line, or remove the file",
            )
        return names
    return tuple(map(str, range(count)))


def _webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise MissingExtra.of("webdataset", "webdataset", "Reading tar shards") from None
