"""Reading weights files."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiedconv.errors import UserError, WeightsError
from tiedconv.io.plain_file import require_plain_file
from tiedconv.sources.sharded_safetensors import (
    NOT_WEIGHTS,
    damaged,
    is_index,
    places,
    shards,
    weights_file,
)
from tiedconv.sources.state_dict import fit_to, load_into

__all__ = [
    "AS_PUBLISHED",
    "Reading",
    "WeightsFile",
    "fit_to",
    "load_into",
    "read_weights",
    "sha256_of_file",
    "sha256_of_weights",
]

# Keys under which training programs save the weights, in the order of preference. The averaged
# weights (EMA) are those that a program evaluates and that timm itself loads.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "module_ema")
_PLAIN = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "teacher",
    "student",
    "backbone",
)
# In torch's errors for a pickle that names a class or function, or has instructions that
# torch.save never writes.
_MORE_THAN_TENSORS = ("GLOBAL", "Unsupported operand", "Unsupported class")


@dataclass(frozen=True)
class Reading:
    """How weights are read.

    Args:
        ema: True for the averaged weights (EMA) of a file that holds both, False for the others;
            None for the averaged ones where there are any, as timm does.
        non_finite: what to do where a weight is NaN, infinite or above `IMMENSE`: `refuse`, or
            `zero` to take 0 for that value.

    Raises:
        UserError: `non_finite` is neither.
    """

    ema: bool | None = None
    non_finite: str = "refuse"

    def __post_init__(self) -> None:
        if self.non_finite not in ("refuse", "zero"):
            raise UserError(
                f"Weights that are not finite can't be treated by {self.non_finite!r}",
                hint="Use refuse or zero",
                code="unknown-choice",
            )


AS_PUBLISHED = Reading()
"""As the libraries read weights, and nothing that is not finite."""


@dataclass(frozen=True)
class WeightsFile:
    """What was read of a weights file.

    Args:
        tensors: by name, in the file's own types.
        part: the key in the file under which they lay, such as `state_dict_ema`; "" for none.
        averaged: whether these are averaged weights (EMA).
        both: whether the file also holds the others.
    """

    tensors: dict[str, Tensor]
    part: str = ""
    averaged: bool = False
    both: bool = False


def read_weights(path: str | Path, ema: bool | None = None) -> WeightsFile:
    """Reads the tensors of a safetensors file or of a PyTorch pickle, on the CPU.

    Args:
        path: the file, whose format is recognised by its content; or an index of shards
            (`.json`), or a folder that holds one of these.
        ema: as in `Reading`.

    Raises:
        WeightsError: the file is missing, damaged, not a weights file, or contains code; or it
            lacks the kind of weights that `ema` asks for (`no-ema-weights`, `only-ema-weights`).
    """
    path = weights_file(path)
    if is_index(path):
        return _of_kind(path, WeightsFile(_read_safetensors(path)), ema)
    try:
        require_plain_file(path)
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(
            f"The weights file {path} can't be read ({error.strerror or error})",
            hint="Give the path of a readable file",
            code="weights-unreadable",
        ) from error
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _of_kind(path, _read_pickle(path, ema), ema)
    if head[8:] == b"{" or path.suffix == ".safetensors":
        return _of_kind(path, WeightsFile(_read_safetensors(path)), ema)
    raise WeightsError(
        f"{path} is not a weights file", hint=NOT_WEIGHTS, code="weights-format-unknown"
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file is an index of shards or, by its first bytes, a safetensors file."""
    if is_index(path):
        return True
    try:
        require_plain_file(path)
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return {name: place.read() for name, place in places(path).items()}


def _of_kind(path: Path, found: WeightsFile, ema: bool | None) -> WeightsFile:
    """The same, if it is the kind of weights that was asked for."""
    if ema is True and not found.averaged:
        raise WeightsError(
            f"{path} holds no averaged weights (EMA)",
            hint="Leave --ema out to take the weights that it has",
            code="no-ema-weights",
        )
    if ema is False and found.averaged:
        raise WeightsError(
            f"{path} holds averaged weights (EMA) alone, under {found.part}",
            hint="Leave --no-ema out to take them",
            code="only-ema-weights",
        )
    return found


def _read_pickle(path: Path, ema: bool | None) -> WeightsFile:
    try:
        # Many training programs store their parsed arguments beside the weights, which are
        # harmless. torch warns of a foreign pickle before it refuses it; the error says enough.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if not any(sign in str(error) for sign in _MORE_THAN_TENSORS):
            raise damaged(path, error) from error
        raise WeightsError(
            f"{path} was refused, as it is a pickle with more in it than tensors",
            "Loading it would run code that the file names",
            "Save the weights alone: safetensors, or torch.save(model.state_dict(), path)",
            code="weights-contain-code",
        ) from error
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise damaged(path, error) from error
    parts = list(_parts(content))
    if not parts:
        raise WeightsError(
            f"There are no named tensors in {path}", hint=NOT_WEIGHTS, code="weights-empty"
        )
    averaged = [part for part in parts if part.averaged]
    others = [part for part in parts if not part.averaged]
    first = (others or averaged) if ema is False else (averaged or others)
    return dataclasses.replace(first[0], both=bool(averaged and others))


def _parts(content: object, part: str = "", averaged: bool = False) -> Iterator[WeightsFile]:
    """The sets of weights in nested dicts, in the order of preference."""
    if not isinstance(content, Mapping):
        return
    inner: list[WeightsFile] = []
    for key in (*AVERAGED, *_PLAIN):
        name = f"{part}.{key}" if part else key
        inner += _parts(content.get(key), name, averaged or key in AVERAGED)
    yield from inner
    own = OrderedDict(
        (name, value.detach())
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    )
    own._metadata = getattr(content, "_metadata", None)  # type: ignore[attr-defined]
    if own and not inner:
        yield WeightsFile(own, part, averaged)


def sha256_of_file(path: str | Path) -> str:
    """The SHA-256 of a file in hexadecimal, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_weights(path: str | Path) -> str:
    """The SHA-256 of a weights file; of shards, that of the list of their names and hashes."""
    path = weights_file(path)
    if not is_index(path):
        return sha256_of_file(path)
    lines = (f"{sha256_of_file(path.parent / shard)}  {shard}" for shard in sorted(shards(path)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
