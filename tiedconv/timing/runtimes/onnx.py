"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from tiedconv.timing.runtimes._base import Run
from tiedconv.timing.runtimes._onnx_files import OnnxFiles


class OnnxRuntime(OnnxFiles):
    """ONNX Runtime on the processor."""

    name: ClassVar = "onnx"
    package: ClassVar = "onnxruntime"
    module: ClassVar = "onnxruntime"
    extra: ClassVar = "onnx"

    def started(self, graph: bytes | Path, inputs: Sequence[Tensor], threads: int) -> Run:
        """A session."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        session: Any = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return lambda: session.run(None, given)


RUNTIME = OnnxRuntime()
