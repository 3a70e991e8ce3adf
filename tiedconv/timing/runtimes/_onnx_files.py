"""Runtimes that read ONNX."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tiedconv.errors import BudgetError
from tiedconv.exporters._format import TEXT, named_inputs
from tiedconv.exporters.onnx import CHEAPER, write_dense, write_tied
from tiedconv.runtime.example_inputs import Arguments
from tiedconv.runtime.narrow_layers import narrow_layers
from tiedconv.runtime.outputs import named_outputs
from tiedconv.timing.inputs import tensors_of
from tiedconv.timing.runtimes._base import Run, Runtime
from tiedconv.timing.runtimes._onnx_layers import layer_graph


class OnnxFiles(Runtime):
    """A runtime on the processor, in float32, on files as `tiedconv export` makes them."""

    limit: ClassVar = CHEAPER

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """A graph of a product for each layer."""
        return self.started(layer_graph(layers, x), [x], threads)

    def model(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """The model as it is exported."""
        path, inputs = folder / "dense.onnx", as_exported(batch)
        write_dense(model, _two(inputs), path)
        return self.started(path, [*inputs.values()], threads)

    def tied(self, model: nn.Module, batch: Arguments, folder: Path, threads: int) -> Run:
        """The model as it is exported, its layers as narrow as what is stored."""
        path, inputs = folder / "tied.onnx", as_exported(batch)
        narrow_layers(model, batch[0] or batch[1])
        with torch.no_grad():
            names = tuple(named_outputs(model(*batch[0], **batch[1])))
        write_tied(model, _two(inputs), names, path)
        return self.started(path, [*inputs.values()], threads)

    @abstractmethod
    def started(self, graph: bytes | Path, inputs: Sequence[Tensor], threads: int) -> Run:
        """A graph, ready to run on an input.

        Args:
            graph: an ONNX model, or its file.
            inputs: in the order of the graph's.
            threads: of the runtime.
        """


def _two(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first two of a batch, as an export is traced with."""
    return {name: torch.cat([x, x])[:2] for name, x in inputs.items()}


def as_exported(batch: Arguments) -> dict[str, Tensor]:
    """The arguments of a model that an exported file takes: images, token ids, or both.

    Others, as masks, are left out: the file is traced without them.
    """
    ids = batch[1].get(TEXT)
    tensors = tensors_of(batch)
    text = ids if ids is not None else next((x for x in tensors if x.dtype == torch.int64), None)
    images = next((x for x in tensors if x.is_floating_point()), None)
    if images is None and text is None:
        raise BudgetError(
            "The time of this model can't be measured: it takes neither images nor token ids",
            "A budget of time means nothing without it",
            "Ask for the time in PyTorch (--on torch), or for multiply-adds: --macs 60%",
            code="latency-unknown",
        )
    if images is None:
        assert text is not None
        return named_inputs(text, None)
    return named_inputs(images, text)
