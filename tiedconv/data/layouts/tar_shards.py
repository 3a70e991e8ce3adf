"""Images in tar shards, as the `webdataset` package writes them.

Members of one sample follow each other and share their name up to its first dot: `0001.jpg` with
`0001.cls` (the label as text) or `0001.json` (with "label"). The package reads shards as a stream.
Here a shard's headers are read once for the place of each image, and then images in any order:
so the order of training depends on its seed alone, and a run resumes where it was interrupted.
The package still decides what makes a sample.

Nothing is ever unpacked to disk, and members of other kinds (pickles above all) are not looked at.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tiedconv.data.annotations import Ints
from tiedconv.data.images import Images
from tiedconv.data.layouts._base import VAL_NAMES, Layout, Parts, listed, part_of
from tiedconv.data.layouts._tar_index import BLOCK, index_of
from tiedconv.errors import DataError, MissingExtra

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_CLASS_FILES = ("classes.txt", "classnames.txt")
_OPEN = 64
"""Shards that a process keeps open."""


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
        in_folder = _shards_in(Path(spec))
        found = in_folder or _by_part(_expanded(spec))
        listing = {part: partial(_listed, paths, labels) for part, paths in found.items()}
        # Shards that were named, and all of one part, are meant as they are.
        if len(found) == 1 and ("" in found or not in_folder):
            return Parts(whole=next(iter(listing.values())))
        val = next((listing[part] for part in VAL_NAMES if part in found), None)
        return Parts(
            train=listing.get("train") or listing.get(""),  # whatever else they are called
            val=val,
            train_spec=f"the training shards by name ({listed(found.get('train', ()), 2)})",
        )


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
            header = self._read(at, start - BLOCK, BLOCK)
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
            file = open(self._paths[shard], "rb", buffering=0)  # noqa: SIM115 (kept)
        self._open[shard] = file  # the last used comes last
        return file


def _shards_in(folder: Path) -> dict[str, list[str]]:
    """The shards of a folder by part: "train", "val", ... or "" where names give none.

    Class folders beside them make it a folder of images, that happens to hold a tar file.
    """
    if not os.path.isdir(folder):
        return {}
    found: dict[str, list[str]] = {}
    for part in ("train", *VAL_NAMES):
        found[part] = sorted(map(str, (folder / part).glob("*.tar")))
    if not any(found.values()):
        shards = sorted(map(str, folder.glob("*.tar")))
        if shards and any(p.is_dir() and p.name[0] not in "._" for p in folder.iterdir()):
            return {}
        found = _by_part(shards)
    return {part: paths for part, paths in found.items() if paths}


def _by_part(shards: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in shards:
        part = part_of(Path(path).stem) or part_of(Path(path).parent.name) or ""
        found.setdefault(part, []).append(path)
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
            code="shards-compressed",
        )
    if "://" in spec or spec.startswith("pipe:"):
        raise DataError(
            f"The shards {spec} are not files",
            "",
            "Copy them to a disk, and give the path",
            code="shards-not-files",
        )
    if "{" in spec:
        _webdataset()
        from webdataset.shardlists import expand_urls

        try:
            names = list(expand_urls(spec))
        except ValueError as error:
            raise DataError(
                f"The pattern {spec} can't be expanded: {error}",
                "It names no shards",
                "Write it as in train-{000000..000147}.tar",
                code="invalid-shard-pattern",
            ) from error
    else:
        names = [spec]
    paths = [path for name in names for path in (sorted(glob.glob(name)) or [name])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"There is no shard {listed(missing)}",
            f"{len(missing):,} of {len(paths):,} are missing" if len(paths) > 1 else "",
            LAYOUT.expected,
            code="shards-missing",
        )
    return paths


def _listed(paths: Sequence[str], labels: bool) -> Images:
    """All samples of some shards, in the order of shards and members."""
    _webdataset()
    index = index_of(paths, labels, LAYOUT.expected)
    store = _Members(paths, *index[:3])
    found: Ints = index[3]
    if found[0] < 0:
        return Images.all_of(store, len(found), None, ())
    return Images.all_of(store, len(found), found, _class_names(paths[0], int(found.max()) + 1))


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
                code="too-few-class-names",
            )
        return names
    return tuple(map(str, range(count)))


def _webdataset() -> None:
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise MissingExtra.of("webdataset", "webdataset", "Reading tar shards") from None
