"""ONNX, with one initializer for each stored tensor."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from tiedconv.exporters._format import Format, Job, Written, named_inputs, unreadable
from tiedconv.exporters._onnx_lower import CHEAPER as CHEAPER
from tiedconv.exporters._onnx_lower import dense_graph, onnx_graph
from tiedconv.exporters._onnx_store import EXTERNAL_ABOVE, INT4_OPSET, narrowed, store_integers
from tiedconv.runtime.tie import state_of
from tiedconv.version import __version__

_T = TypeVar("_T")


class Onnx(Format):
    """For ONNX Runtime and other readers of ONNX; the batch size is dynamic."""

    name: ClassVar = "onnx"
    endings: ClassVar = (".onnx",)
    dtypes: ClassVar = ("float32", "float16", "int8")
    packages: ClassVar = ("onnx", "onnxscript", "onnx_ir")
    extra: ClassVar = "onnx"
    opens: ClassVar = True
    timed: ClassVar = True
    runtime: ClassVar = "ONNX Runtime"
    lean: ClassVar = "session.disable_prepacking"

    def write(self, job: Job) -> Written:
        """By torch's exporter, with the plan's factors in place of weights."""
        plan = state_of(job.model).plan
        fits = any(each.bits == 4 for each in job.integers.values())
        opset = INT4_OPSET if fits and job.opset is None else job.opset
        graph, lowered = onnx_graph(
            job.model, job.inputs, job.outputs, lower=job.lower, opset=opset
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
        for name, value in job.about.items():
            graph.metadata_props[name] = json.dumps(value, ensure_ascii=False)
        size = sum(t.nbytes for t in held)
        _save(graph, job.path)
        return Written(len(held), sum(t.size for t in held), size, facts)

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The initializers; INT4 as int8, as torch has none."""
        return self._read(path, lambda held: _tensor(held.numpy()))

    def held_bytes(self, path: Path) -> int:
        """Of the initializers; two numbers of INT4 are one byte."""
        return sum(self._read(path, lambda held: int(held.nbytes)).values())

    def _read(self, path: Path, figure: Callable[[Any], _T]) -> dict[str, _T]:
        self.check()
        import onnx_ir as ir
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            values = ir.load(path).graph.initializers.items()
            return {n: figure(v.const_value) for n, v in values if v.const_value is not None}
        except (DecodeError, ir.serde.SerdeError, OSError, ValueError, KeyError) as error:
            raise unreadable(path, "an ONNX file", error) from error

    def why_not_run(self) -> str | None:
        """It takes ONNX Runtime."""
        found = importlib.util.find_spec("onnxruntime")
        return "ONNX Runtime is not installed" if found is None else None

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """By ONNX Runtime, in float32.

        By default it multiplies matrices of integers with activations rounded to 8 bits.
        """
        exact = {"session.qdq_matmulnbits_accuracy_level": "1"}
        return _started(path, 0, exact)(images, text)

    def opened(
        self, path: Path, threads: int = 0, *, lean: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """In ONNX Runtime at its defaults; `lean` tells it to pack no matrices."""
        return _started(path, threads, {self.lean: "1"} if lean else {})

    def write_plain(
        self, model: nn.Module, images: Tensor, path: Path, text: Tensor | None = None
    ) -> None:
        """See `write_dense`."""
        write_dense(model, named_inputs(images, text), path)


def _started(
    path: Path, threads: int, entries: Mapping[str, str]
) -> Callable[..., dict[str, Tensor]]:  # fmt: skip
    """A session of ONNX Runtime on the CPU, as a function from inputs to outputs by name."""
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (
        state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
        state.NoSuchFile, state.NotImplemented, state.RuntimeException,
    ) as error:  # fmt: skip
        raise unreadable(path, "a model that ONNX Runtime can load", error) from error
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        given = {n: t.numpy() for n, t in named_inputs(images, text).items()}
        found = session.run(names, given)
        return {n: torch.from_numpy(value) for n, value in zip(names, found, strict=True)}

    return run


def _tensor(array: Any) -> Tensor:
    """An initializer; INT4 as int8, as torch has none."""
    if "int4" in array.dtype.name:
        return torch.from_numpy(array.astype("int8"))
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def write_dense(model: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Write a plain model as ONNX, as a baseline, each weight in the layout it is read in.

    Args:
        model: plain, in evaluation mode.
        inputs: an example of each, `(n, ...)`, n at least 2.
        path: the file to write.
    """
    _save(dense_graph(model, inputs), path)


def write_tied(
    model: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path
) -> None:
    """Write a tied model as ONNX, as `Onnx.write` does, to be timed.

    Args:
        model: tied, in evaluation mode; it is changed, so give a copy.
        inputs: an example of each, `(n, ...)`, n at least 2.
        outputs: their names.
        path: the file to write.
    """
    _save(onnx_graph(model, inputs, outputs)[0], path)


def _save(graph: Any, path: Path) -> None:
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value)
    ir.save(graph, path, external_data=f"{path.name}.data" if size > EXTERNAL_ABOVE else None)


FORMAT = Onnx()
