"""ONNX, with one initializer for each stored tensor."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedconv.exporters._format import Format, Job, Written, unreadable
from tiedconv.exporters._onnx_graph import IMAGES
from tiedconv.exporters._onnx_lower import dense_graph, onnx_graph
from tiedconv.exporters._onnx_store import EXTERNAL_ABOVE, INT4_OPSET, narrowed, store_integers
from tiedconv.runtime.tie import state_of
from tiedconv.version import __version__


class Onnx(Format):
    """For ONNX Runtime and other readers of ONNX; the batch size is dynamic."""

    name: ClassVar = "onnx"
    endings: ClassVar = (".onnx",)
    dtypes: ClassVar = ("float32", "float16", "int8")
    packages: ClassVar = ("onnx", "onnxscript", "onnx_ir")
    extra: ClassVar = "onnx"

    def write(self, job: Job) -> Written:
        """By torch's exporter, with the plan's factors in place of weights."""
        import onnx_ir as ir

        plan = state_of(job.model).plan
        fits = any(each.bits == 4 for each in job.integers.values())
        opset = INT4_OPSET if fits and job.opset is None else job.opset
        graph, lowered = onnx_graph(
            job.model, job.images, job.outputs, lower=job.lower, opset=opset
        )
        packed = store_integers(graph, job.integers)
        if job.dtype != "float32":
            narrowed(graph, job.dtype)
        facts = {
            "factored": len(lowered.factored),
            "materialized": len(lowered.materialized),
            "opset": graph.opset_imports[""],
            "one_copy": lowered.one_copy,
            "packed": packed,
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
        self.check()
        import onnx_ir as ir
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            graph = ir.load(path).graph
            return {
                name: _tensor(value.const_value.numpy())
                for name, value in graph.initializers.items()
                if value.const_value is not None
            }
        except (DecodeError, ir.serde.SerdeError, OSError, ValueError, KeyError) as error:
            raise unreadable(path, "an ONNX file", error) from error

    def why_not_run(self) -> str | None:
        """It takes ONNX Runtime."""
        found = importlib.util.find_spec("onnxruntime")
        return "ONNX Runtime is not installed" if found is None else None

    def run(self, path: Path, images: Tensor) -> dict[str, Tensor]:
        """By ONNX Runtime, in float32."""
        import onnxruntime as ort
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        options = ort.SessionOptions()
        options.log_severity_level = 3
        # Else matrices of integers are multiplied with activations rounded to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except (
            state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
            state.NoSuchFile, state.NotImplemented, state.RuntimeException,
        ) as error:  # fmt: skip
            raise unreadable(path, "a model that ONNX Runtime can load", error) from error
        names = [output.name for output in session.get_outputs()]
        found = session.run(names, {IMAGES: images.numpy()})
        return {n: torch.from_numpy(value) for n, value in zip(names, found, strict=True)}


def _tensor(array: Any) -> Tensor:
    """An initializer; INT4 as int8, as torch has none."""
    known = array.dtype.kind in "fiub" and array.dtype.isbuiltin == 1
    return torch.from_numpy(array.copy() if known else array.astype("int8"))


def write_dense(model: nn.Module, images: Tensor, path: Path) -> None:
    """Write a plain model as ONNX, as a baseline, each weight in the layout it is read in.

    Args:
        model: plain, in evaluation mode.
        images: an example `(n, C, H, W)`, n at least 2.
        path: the file to write.
    """
    import onnx_ir as ir

    graph = dense_graph(model, images)
    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)
    ir.save(graph, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)


FORMAT = Onnx()
