"""What a runtime has to do to be timed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from tiedconv.errors import MissingExtra
from tiedconv.runtime.example_inputs import Arguments

Run = Callable[[], object]
"""Runs once, on an input that it holds."""


class Runtime(ABC):
    """A runtime on the processor of this machine.

    Attributes:
        name: as `--on` takes it.
        limit: factors are applied if they take at most this share of a weight's multiply-adds;
            None where whatever takes less time is run.
        package, module: that it needs, as it is installed and as it is imported.
        extra: of this package that brings it, "" where nothing more is needed.
    """

    name: ClassVar[str]
    limit: ClassVar[float | None]
    package: ClassVar[str]
    module: ClassVar[str]
    extra: ClassVar[str]

    def check(self) -> None:
        """Raises MissingExtra if its package is not installed."""
        if importlib.util.find_spec(self.module) is None:
            raise MissingExtra.of(self.package, self.extra, f"Timing in {self.name}")

    def version(self) -> str:
        """Of its package."""
        return importlib.metadata.version(self.package)

    @abstractmethod
    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """Linear layers or convolutions, one after the other.

        Args:
            layers: `nn.Linear` and `nn.Conv2d` alone.
            x: their input.
            threads: of the runtime.
        """

    @abstractmethod
    def model(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """A whole plain model.

        Args:
            model: in evaluation mode.
            batch: its arguments.
            folder: for files, until the run is dropped.
            threads: of the runtime.
        """

    @abstractmethod
    def tied(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """A whole tied model, its factors applied where the runtime would apply them.

        Args:
            model: in evaluation mode; it is changed, so give a copy.
            batch, folder, threads: see `model`.
        """
