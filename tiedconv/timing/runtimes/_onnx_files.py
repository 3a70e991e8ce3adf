"""Runtimes that read ONNX."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from tiedconv.exporters.onnx import CHEAPER, write_dense
from tiedconv.timing.runtimes._base import Run, Runtime
from tiedconv.timing.runtimes._onnx_layers import layer_graph


class OnnxFiles(Runtime):
    """A runtime on the processor, in float32, on files as `tiedconv export` makes them."""

    limit: ClassVar = CHEAPER

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """A graph of a product for each layer."""
        return self.started(layer_graph(layers, x), x, threads)

    def model(self, model: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
        """The model as it is exported."""
        path = folder / "dense.onnx"
        write_dense(model, {"images": x.new_zeros(2, *x.shape[1:])}, path)
        return self.started(path, x, threads)

    @abstractmethod
    def started(self, graph: bytes | Path, x: Tensor, threads: int) -> Run:
        """A graph, ready to run on an input.

        Args:
            graph: an ONNX model, or its file.
            x: the input.
            threads: of the runtime.
        """
