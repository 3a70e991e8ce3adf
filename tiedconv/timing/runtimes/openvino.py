"""OpenVINO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tiedconv.timing.runtimes._base import Run
from tiedconv.timing.runtimes._onnx_files import OnnxFiles


class OpenVino(OnnxFiles):
    """OpenVINO on the processor."""

    name: ClassVar = "openvino"
    package: ClassVar = "openvino"
    module: ClassVar = "openvino"
    extra: ClassVar = "openvino"

    def started(self, graph: bytes | Path, inputs: Sequence[Tensor], threads: int) -> Run:
        """A request of the compiled graph."""
        import openvino as ov

        core = ov.Core()
        read: Any = core.read_model(graph)
        how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        request = core.compile_model(read, "CPU", how).create_infer_request()
        given = [x.numpy() for x in inputs]
        return lambda: request.infer(given, share_inputs=True)


RUNTIME = OpenVino()
