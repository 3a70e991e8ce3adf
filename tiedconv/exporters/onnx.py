"""ONNX, with one initializer for each stored tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tiedconv.errors import CheckpointError
from tiedconv.exporters._format import Format, Job, Written
from tiedconv.exporters._onnx_graph import IMAGES
from tiedconv.exporters._onnx_lower import dense_graph, onnx_graph
from tiedconv.exporters._onnx_store import EXTERNAL_ABOVE, narrowed
from tiedconv.runtime.tie import state_of
from tiedconv.version import __version__


class Onnx(Format):
    """For ONNX Runtime and all that reads ONNX; any number of images is taken."""

    name: ClassVar = "onnx"
    endings: ClassVar = (".onnx",)
    dtypes: ClassVar = ("float32", "float16", "int8")
    packages: ClassVar = ("onnx", "onnxscript", "onnx_ir")
    extra: ClassVar = "onnx"

    def write(self, job: Job) -> Written:
        """By torch's exporter, the plan's factors in place of weights."""
        import onnx_ir as ir

        plan = state_of(job.model).plan
        graph, lowered = onnx_graph(job.model, job.images, lower=job.lower, opset=job.opset)
        if job.dtype != "float32":
            narrowed(graph, job.dtype)
        facts = {
            "factored": len(lowered.factored),
            "materialized": len(lowered.materialized),
            "opset": graph.opset_imports[""],
            "one_copy": lowered.one_copy,
        }
        about = {"version": __version__, "stored": plan.stored, "original": plan.original}
        graph.metadata_props["tiedconv"] = json.dumps({**about, **facts}, sort_keys=True)
        held = [v.const_value for v in graph.graph.initializers.values() if v.const_value]
        size = sum(t.nbytes for t in held)
        data = f"{job.name}.data" if size > EXTERNAL_ABOVE else None
        ir.save(graph, job.path, external_data=data)
        return Written(len(held), sum(t.size for t in held), size, facts)

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The initializers."""
        import onnx_ir as ir

        self.check()
        try:
            graph = ir.load(path).graph
            return {
                name: torch.from_numpy(value.const_value.numpy().copy())
                for name, value in graph.initializers.items()
                if value.const_value is not None
            }
        except Exception as error:  # protobuf's errors have no common base
            raise CheckpointError(
                f"{path} is no ONNX file that can be read",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
                "Export it again",
            ) from None

    def run(self, path: Path, images: Tensor) -> Tensor | None:
        """By ONNX Runtime, if it is installed."""
        try:
            import onnxruntime as ort
        except ImportError:
            return None
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has no common base of its errors
            raise CheckpointError(
                f"{path} is no model that ONNX Runtime can load",
                str(error).splitlines()[0],
                "Export it again",
            ) from None
        (found,) = session.run(None, {IMAGES: images.numpy()})
        return torch.from_numpy(found)


def write_dense(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a plain model as ONNX, to compare with: its weights stored as a runtime reads them.

    Args:
        model: plain, in evaluation mode.
        images: an example `(n, C, H, W)`, n at least 2.
        path: the file.
    """
    import onnx_ir as ir

    graph = dense_graph(model, images)
    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)
    ir.save(graph, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)


FORMAT = Onnx()
