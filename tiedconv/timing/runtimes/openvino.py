"""OpenVINO, on files as `tiedconv export` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from tiedconv.exporters.onnx import CHEAPER, write_dense
from tiedconv.timing.runtimes._base import Run, Runtime
from tiedconv.timing.runtimes._onnx_layers import layer_graph


class OpenVino(Runtime):
    """OpenVINO on the processor, in float32."""

    name: ClassVar = "openvino"
    limit: ClassVar = CHEAPER
    package: ClassVar = "openvino"
    module: ClassVar = "openvino"
    extra: ClassVar = "openvino"

    def layers(self, layers: nn.Sequential, x: Tensor, threads: int) -> Run:
        """A graph of a product for each layer."""
        return _compiled(layer_graph(layers, x), x, threads)

    def model(self, model: nn.Module, x: Tensor, folder: Path, threads: int) -> Run:
        """The model as it is exported."""
        path = folder / "dense-openvino.onnx"
        write_dense(model, {"images": x.new_zeros(2, *x.shape[1:])}, path)
        return _compiled(path, x, threads)


def _compiled(graph: bytes | Path, x: Tensor, threads: int) -> Run:
    import openvino as ov

    core = ov.Core()
    read: Any = core.read_model(graph)
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(read, "CPU", how).create_infer_request()
    given = [x.numpy()]
    return lambda: request.infer(given, share_inputs=True)


RUNTIME = OpenVino()
