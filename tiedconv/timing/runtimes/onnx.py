"""ONNX Runtime, on files as `tiedconv export` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tiedconv.exporters.onnx import CHEAPER, write_dense
from tiedconv.timing.runtimes._base import Run, Runtime
from tiedconv.timing.runtimes._onnx_layers import layer_graph


class OnnxRuntime(Runtime):
    """ONNX Runtime on the processor, in float32."""

    name: ClassVar = "onnx"
    limit: ClassVar = CHEAPER
    package: ClassVar = "onnxruntime"
    module: ClassVar = "onnxruntime"
    extra: ClassVar = "onnx"

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """A graph of a product for each layer."""
        return _session(layer_graph(layers, x), x, threads)

    def model(self, model: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
        """The model as it is exported."""
        path = folder / "dense.onnx"
        write_dense(model, {"images": x.new_zeros(2, *x.shape[1:])}, path)
        return _session(str(path), x, threads)


def _session(graph: bytes | str, x: Tensor, threads: int) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


RUNTIME = OnnxRuntime()
