"""Small tensors as one: in the header of a file each takes a hundred bytes, and so do its hashes.

A file with integers (version 2) holds tensors below `SMALL` bytes one after another in `JOINED`, in
the order of a list in its record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiedconv.core.expr import Shape
from tiedconv.io.raw import bytes_of
from tiedconv.io.safetensors_file import DTYPES, Form

SMALL = 8192  # bytes
JOINED = "tied/small"

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A tensor within `JOINED`.

    Args:
        dtype: safetensors' name of it.
        shape: of the tensor.
        start, stop: its bytes.
    """

    dtype: str
    shape: Shape
    start: int
    stop: int

    def of(self, joined: Tensor) -> Tensor:
        """The tensor, in memory of its own."""
        data = joined[self.start : self.stop].clone()
        return data.view(DTYPES[self.dtype]).reshape(self.shape)


def small_names(forms: Mapping[str, Form]) -> list[str]:
    """The tensors that are joined."""
    return sorted(n for n, (dtype, shape) in forms.items() if _size(dtype, shape) < SMALL)


def joined(names: Sequence[str], tensor: Callable[[str], Tensor]) -> Tensor:
    """The bytes of some tensors, one after another, uint8 `(n,)`."""
    data = b"".join(bytes(bytes_of(tensor(name).cpu())) for name in names)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def list_of(names: Sequence[str], forms: Mapping[str, Form]) -> list[list[str]]:
    """The record's list: names and dtypes."""
    return [[name, _NAMES[forms[name][0]]] for name in names]


def parts_of(entries: Any, shapes: Mapping[str, Shape]) -> dict[str, Part]:
    """Where each joined tensor is.

    Args:
        entries: the record's list, of an untrusted file.
        shapes: of all tensors that the file should have.

    Raises:
        ValueError: it is malformed.
    """
    found: dict[str, Part] = {}
    end = 0
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [str(name), str(dtype)] if (
                name in shapes and name not in found and dtype in DTYPES
            ):
                start, end = end, end + _size(DTYPES[dtype], shapes[name])
                found[name] = Part(dtype, shapes[name], start, end)
            case _:
                raise ValueError("its list of small tensors is malformed")
    return found


def _size(dtype: torch.dtype, shape: Shape) -> int:
    return math.prod(shape) * dtype.itemsize
