"""Weights in safetensors files, whole or in shards: where each tensor lies, and reading one alone.

Large models come as several files and an index, `model.safetensors.index.json`, whose
`weight_map` says which file holds which tensor. Here is all that reads such a head; the numbers
themselves are read one tensor at a time, into memory of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tiedconv.errors import WeightsError
from tiedconv.io.json_text import strict_json

NOT_WEIGHTS = "Give a .safetensors file or a state dict that torch.save wrote"
_AGAIN = "Copy or download the folder again"
_INDEX = "*.safetensors.index.json"
_WHOLE = "model.safetensors"

# Types by the names that safetensors has for them. A file with another one is read whole.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Args:
        file: that holds it.
        dtype: as safetensors names it.
        shape: of the tensor.
        start: of its first byte in the file.
        stop: one past its last byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own.

        It is read, not mapped: pages of a mapped file count as the process's memory.

        Raises:
            WeightsError: the file is gone, or shorter than it was.
        """
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        rest = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start)
                while rest:
                    count = file.readinto(rest)
                    if not count:
                        raise OSError("it has become shorter")
                    rest = rest[count:]
        except OSError as error:
            raise damaged(self.file, error) from error
        return tensor


def weights_file(path: str | Path) -> Path:
    """The file that a path given for weights means: of a folder, its one file or its index.

    Raises:
        WeightsError: it is a folder without `model.safetensors` or an index, or with several
            indices.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    found = sorted(path.glob(_WHOLE)) or sorted(path.glob(_INDEX))
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(
            f"The folder {path} holds {len(found)} indices of weights",
            "It is not clear which one is meant",
            f"Name one of them, such as {found[0]}",
        )
    raise WeightsError(
        f"The folder {path} can't be read as weights: it holds no {_WHOLE} and no {_INDEX}",
        hint="Name the weights file itself",
    )


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return path.suffix == ".json"


def places(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies, or of all the shards of an index.

    Raises:
        WeightsError: a file is missing, damaged or a compact one; the index is malformed, names
            a file outside its folder, or contradicts the shards.
    """
    return _of_shards(path) if is_index(path) else _of_file(path)


def shards(index: Path) -> dict[str, list[str]]:
    """The shards that an index names, each with the tensors that it should hold.

    Raises:
        WeightsError: it can't be read, is malformed, or names a file outside its folder.
    """
    try:
        data = strict_json(index.read_text("utf-8"))
    except OSError as error:
        raise WeightsError(
            f"The index {index} can't be read ({error.strerror or error})",
            hint="Give the path of a readable file",
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"The index {index} is malformed ({error})", "No weights were read", _AGAIN
        ) from error
    match data:
        case {"weight_map": dict(weight_map)} if weight_map and all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            pass
        case _:
            raise WeightsError(
                f"{index} is no index of shards: it has no weight_map from tensors to files",
                "No weights were read",
                NOT_WEIGHTS,
            )
    found: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not _is_inside(shard):
            raise WeightsError(
                f"The index {index} names the file {shard!r}, which is not in its folder",
                "No path in a file is forward_with_grad out of the file's folder",
                "If you trust it, put the shards beside the index and correct the names",
            )
        found.setdefault(shard, []).append(tensor)
    return found


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, its head checked: the one that plain weights lie in.

    Raises:
        WeightsError: it is missing, damaged, or a compact file of tiedconv.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            if "tiedconv" in (file.metadata() or {}):
                raise WeightsError(
                    f"{path} is a compact file of tiedconv, not the weights of a plain model",
                    "Its tensors have other names and shapes",
                    "Pass it as the model, or expand it first with: tiedconv export --to dense",
                )
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> WeightsError:
    """The error for a file that can't be read as weights."""
    told = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    reason = (told.strip().splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"{path} is damaged, cut short or not a weights file ({reason[:120]})",
        "No weights were read",
        "Copy or download it again. " + NOT_WEIGHTS,
    )


def _of_file(path: Path) -> dict[str, Place]:
    with opened(path), path.open("rb") as file:
        # Opening it has checked that the head is sound: offsets follow on each other and end
        # where the file does.
        length = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(length))
    head.pop("__metadata__", None)
    first = 8 + length
    found: dict[str, Place] = {}
    for name, entry in head.items():
        start, stop = (first + offset for offset in entry["data_offsets"])
        found[name] = Place(path, entry["dtype"], tuple(entry["shape"]), start, stop)
    return found


def _of_shards(index: Path) -> dict[str, Place]:
    listed = shards(index)
    missing = [shard for shard in listed if not (index.parent / shard).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {_some(missing)}, which the index {index.name} names",
            "The model is not whole",
            _AGAIN,
        )
    found: dict[str, Place] = {}
    held: dict[str, str] = {}
    for shard, wanted in listed.items():
        there = _of_file(index.parent / shard)
        if twice := [name for name in there if name in held]:
            raise WeightsError(
                f"{twice[0]} is in two shards of {index}: {held[twice[0]]} and {shard}",
                "It is not clear which one is meant",
                _AGAIN,
            )
        held |= dict.fromkeys(there, shard)
        if absent := [name for name in wanted if name not in there]:
            raise WeightsError(
                f"{index.parent / shard} lacks {_some(absent)}, which the index says it holds",
                "The index and its shards don't belong together",
                _AGAIN,
            )
        found |= {name: there[name] for name in wanted}
    return found


def _is_inside(shard: str) -> bool:
    """Whether a relative path goes down only, whichever system reads it.

    Links are not resolved: a cache may keep its files elsewhere, and an index can't make links.
    """
    parts = shard.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") and ":" not in part for part in parts)


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
