"""Plain weights in safetensors files, single or sharded: where each tensor lies.

Large models come as several files and an index, `model.safetensors.index.json`, whose
`weight_map` maps each tensor to its file. Tensors are read one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiedconv.errors import CheckpointError, WeightsError
from tiedconv.io.json_text import strict_json
from tiedconv.io.plain_file import read_text
from tiedconv.io.safetensors_file import DTYPES, FOREIGN, SafetensorsFile

NOT_WEIGHTS = "Give a .safetensors file or a state dict that torch.save wrote"
_AGAIN = "Copy or download the folder again"
_INDEX = "*.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Place:
    """A tensor in a safetensors file.

    Args:
        file: that holds it, open: another file that replaces it is not read.
        name: of the tensor in the file.
    """

    file: SafetensorsFile
    name: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return DTYPES[self.file.dtypes[self.name]]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.file.shapes[self.name]

    def read(self) -> Tensor:
        """The tensor, read into memory rather than mapped.

        Raises:
            WeightsError: the file is shorter than it was.
        """
        try:
            return self.file.tensor(self.name)
        except CheckpointError as error:
            raise _not_read(self.file.path, error) from error


def weights_file(path: str | Path) -> Path:
    """The weights file of a path: the path itself, or the single file or index of a folder.

    Raises:
        WeightsError: it is a folder without `model.safetensors` or an index, or with several
            indices.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    found = sorted(path.glob(_SINGLE)) or sorted(path.glob(_INDEX))
    if len(found) == 1:
        return found[0]
    if found:
        raise WeightsError(
            f"The folder {path} holds {len(found)} indices of weights",
            "It is not clear which one is meant",
            f"Name one of them, such as {found[0]}",
            code="weights-ambiguous",
        )
    raise WeightsError(
        f"The folder {path} can't be read as weights: it holds no {_SINGLE} and no {_INDEX}",
        hint="Name the weights file itself",
        code="weights-not-found",
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
        data = strict_json(read_text(index, FOREIGN.header))
    except OSError as error:
        raise WeightsError(
            f"The index {index} can't be read ({error.strerror or error})",
            hint="Give the path of a readable file",
            code="weights-unreadable",
        ) from error
    except ValueError as error:
        raise WeightsError(
            f"The index {index} is malformed ({error})",
            "No weights were read",
            _AGAIN,
            code="index-malformed",
        ) from error
    match data:
        case {"weight_map": dict(weight_map)} if weight_map and all(
            isinstance(shard, str) for shard in weight_map.values()
        ):
            pass
        case _:
            raise WeightsError(
                f"{index} is not an index of shards: it has no weight_map from tensors to files",
                "No weights were read",
                NOT_WEIGHTS,
                code="index-malformed",
            )
    found: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not _is_inside(shard):
            raise WeightsError(
                f"The index {index} names the file {shard!r}, which is not in its folder",
                "Paths in a file are not followed out of its folder",
                "If you trust it, put the shards beside the index and correct the names",
                code="shard-outside-folder",
            )
        found.setdefault(shard, []).append(tensor)
    return found


def opened(path: Path) -> SafetensorsFile:
    """A safetensors file of plain weights, its header checked.

    Raises:
        WeightsError: it is missing, damaged, or a compact file of tiedconv.
    """
    try:
        file = SafetensorsFile(path, FOREIGN)
        _ = file.shapes  # the checks of the tensors' places
    except CheckpointError as error:
        raise _not_read(path, error) from error
    if "tiedconv" in file.metadata:
        raise WeightsError(
            f"{path} is a compact file of tiedconv, not the weights of a plain model",
            "Its tensors have other names and shapes",
            "Pass it as the model, or expand it first with: tiedconv export --to dense",
            code="weights-are-compact",
        )
    return file


def _not_read(path: Path, error: CheckpointError) -> WeightsError:
    reason = error.what.removeprefix(f"{path}").removeprefix(": ")
    return damaged(path, ValueError(reason.strip()))


def damaged(path: Path, error: Exception) -> WeightsError:
    """The error for a file that can't be read as weights."""
    message = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    reason = (message.strip().splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"{path} is damaged, truncated or not a weights file ({reason[:120]})",
        "No weights were read",
        "Copy or download it again. " + NOT_WEIGHTS,
        code="weights-damaged",
    )


def _of_file(path: Path) -> dict[str, Place]:
    file = opened(path)
    return {name: Place(file, name) for name in file.shapes}


def _of_shards(index: Path) -> dict[str, Place]:
    listed = shards(index)
    missing = [shard for shard in listed if not (index.parent / shard).is_file()]
    if missing:
        raise WeightsError(
            f"{index.parent} lacks {_some(missing)}, which the index {index.name} names",
            "The model is incomplete",
            _AGAIN,
            code="shard-missing",
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
                code="shards-inconsistent",
            )
        held |= dict.fromkeys(there, shard)
        if absent := [name for name in wanted if name not in there]:
            raise WeightsError(
                f"{index.parent / shard} lacks {_some(absent)}, which the index says it holds",
                "The index and its shards don't belong together",
                _AGAIN,
                code="shards-inconsistent",
            )
        found |= {name: there[name] for name in wanted}
    return found


def _is_inside(shard: str) -> bool:
    """Whether a relative path stays in its folder, on any operating system.

    Links are not resolved: a cache may keep its files elsewhere, and an index can't make links.
    """
    parts = shard.replace("\\", "/").split("/")
    return all(part not in ("", ".", "..") and ":" not in part for part in parts)


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
