"""Reading weights files."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tiedconv.errors import WeightsError
from tiedconv.sources.sharded_safetensors import (
    NOT_WEIGHTS,
    damaged,
    is_index,
    places,
    shards,
    weights_file,
)
from tiedconv.sources.state_dict import fit_to, load_into

__all__ = ["fit_to", "load_into", "read_weights", "sha256_of_file", "sha256_of_weights"]

# Keys under which training programs save the weights, in the order of preference.
_CONTAINERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "module",
    "params",
    "weights",
    "model_ema",
    "state_dict_ema",
    "ema",
    "ema_state_dict",
    "teacher",
    "student",
    "backbone",
)
# In torch's errors for a pickle that names a class or function, or has instructions that
# torch.save never writes.
_MORE_THAN_TENSORS = ("GLOBAL", "Unsupported operand", "Unsupported class")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file or of a PyTorch pickle, on the CPU.

    Args:
        path: the file, whose format is recognised by its content; or an index of shards
            (`.json`), or a folder that holds one of these.

    Returns:
        The tensors by name, in the file's own types. Containers such as `state_dict` or
        `model` are unwrapped.

    Raises:
        WeightsError: the file is missing, damaged, not a weights file, or contains code.
    """
    path = weights_file(path)
    if is_index(path):
        return _read_safetensors(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(
            f"The weights file {path} can't be read ({error.strerror or error})",
            hint="Give the path of a readable file",
            code="weights-unreadable",
        ) from error
    if head[:2] == b"PK" or head[:1] == b"\x80":
        return _read_pickle(path)
    if head[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise WeightsError(
        f"{path} is not a weights file", hint=NOT_WEIGHTS, code="weights-format-unknown"
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file is an index of shards or, by its first bytes, a safetensors file."""
    if is_index(path):
        return True
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return {name: place.read() for name, place in places(path).items()}


def _read_pickle(path: Path) -> dict[str, Tensor]:
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
    tensors = _unwrap(content)
    if not tensors:
        raise WeightsError(
            f"There are no named tensors in {path}", hint=NOT_WEIGHTS, code="weights-empty"
        )
    return tensors


def _unwrap(content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    for container in _CONTAINERS:
        if found := _unwrap(content.get(container)):
            return found
    return {
        name: value.detach()
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


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
