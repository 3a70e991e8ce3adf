"""What a format is given, and what it tells of the files it wrote."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedconv.errors import MissingExtra
from tiedconv.runtime.tie import state_of

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
"""Kinds of stored numbers, and the bytes of each."""

LOWERINGS = ("auto", "always", "never")
"""Whether factors are applied one by one: where that is as fast, always, never."""


@dataclass(frozen=True)
class Job:
    """One export.

    Args:
        model: tied, in evaluation mode; a format may change it.
        images: random ones to trace with, `(2, C, H, W)`.
        folder: to write into.
        name: of the main file.
        dtype: how weights are stored; kernels and matrices only, the rest stays float32.
        lower: one of `LOWERINGS`.
        opset: of ONNX, None to choose.
    """

    model: nn.Module
    images: Tensor
    folder: Path
    name: str
    dtype: str = "float32"
    lower: str = "auto"
    opset: int | None = None

    @property
    def path(self) -> Path:
        """The main file."""
        return self.folder / self.name


@dataclass(frozen=True)
class Written:
    """What was written.

    Args:
        tensors: how many the file holds.
        parameters: numbers in them.
        weight_bytes: bytes that hold them.
        facts: more to know, by name; plain data.
    """

    tensors: int
    parameters: int
    weight_bytes: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class Format(ABC):
    """One form that needs no tiedconv.

    `name` is what `--to` says, `endings` those of its file, `dtypes` what it can store, `packages`
    what it needs besides torch, `extra` what installs that, and `compact` whether each stored
    tensor is in it once.
    """

    name: ClassVar[str]
    endings: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    compact: ClassVar[bool] = True

    def check(self) -> None:
        """Raise MissingExtra if a package that the format needs is not installed."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise MissingExtra.of(package, self.extra, f"Export to {self.name}")

    @abstractmethod
    def write(self, job: Job) -> Written:
        """Write the file, and those beside it."""

    def tensors(self, path: Path) -> dict[str, Tensor] | None:
        """Every tensor that a file holds, by name; None if that can't be told.

        Raises:
            CheckpointError: the file can't be read.
        """
        del path
        return None

    @abstractmethod
    def run(self, path: Path, images: Tensor) -> Tensor | None:
        """The logits `(n, classes)` that a written file gives; None if it can't be run here."""


def is_weight(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is stored in the narrower form: a matrix or a kernel, of floats."""
    wide = sum(n > 1 for n in tensor.shape) >= 2
    is_matrix = name.startswith("tied/") or name.endswith("weight")
    return wide and is_matrix and tensor.is_floating_point()


def stored_bytes(model: nn.Module, dtype: str) -> int:
    """The bytes of a tied model's tensors, each once, with weights of this kind.

    Args:
        model: tied.
        dtype: one of `DTYPES`.
    """
    plan = state_of(model).plan
    own = model.state_dict()
    total = 0
    for name in [*plan.kept, *plan.factors]:
        tensor = own[name]
        size = tensor.element_size()
        if is_weight(name, tensor):
            size = min(size, DTYPES[dtype])
            if dtype == "int8":
                total += 4 * tensor.shape[0]  # a scale for each row
        total += tensor.numel() * size
    return total


def random_images(channels: int, size: int) -> Tensor:
    """Images to trace and compare with, `(2, channels, size, size)`, always the same."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))
