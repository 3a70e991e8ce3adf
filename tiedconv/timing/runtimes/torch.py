"""PyTorch, eager: what `tiedconv.optimize` makes of a model."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tiedconv.runtime.example_inputs import Arguments
from tiedconv.runtime.optimize import optimize
from tiedconv.timing.runtimes._base import Run, Runtime


class Torch(Runtime):
    """Eager PyTorch, in float32."""

    name: ClassVar = "torch"
    limit: ClassVar = None
    package: ClassVar = "torch"
    module: ClassVar = "torch"
    extra: ClassVar = ""

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """As they are."""
        return self._run(layers, ((x,), {}), threads)

    def model(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """As it is."""
        del folder
        return self._run(model, batch, threads)

    def tied(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """The model as `optimize` leaves it."""
        del folder
        args, kwargs = batch
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            optimize(model, example=args or kwargs)
        finally:
            torch.set_num_threads(before)
        return self._run(model, batch, threads)

    def _run(self, module: nn.Module, given: Arguments, threads: int) -> Run:
        args, kwargs = given

        def run() -> object:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with torch.inference_mode():
                    return module(*args, **kwargs)
            finally:
                torch.set_num_threads(before)

        return run


RUNTIME = Torch()
