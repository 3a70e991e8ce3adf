"""ExecuTorch, for phones and embedded devices, computed by its XNNPACK delegate."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tiedconv.exporters._executorch_partition import partitioner
from tiedconv.exporters._format import Format, Job, Written, refusals, unreadable
from tiedconv.exporters._one_image import one_image_program, prepare
from tiedconv.exporters.pt2 import quiet
from tiedconv.runtime.outputs import named_outputs
from tiedconv.version import __version__

_METHOD, _ABOUT = "forward", "tiedconv"
_DAMAGED = (
    RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, AssertionError,
    struct.error, OSError,
)  # fmt: skip
"""What reading a damaged file raises: the reader of its tables checks nothing."""


class ExecuTorch(Format):
    """A program of one image at a time; each stored tensor is in the file once.

    Factors are applied one by one wherever a layer can. Weights that are materialised, of other
    layers, are computed in each run.
    """

    name: ClassVar = "executorch"
    endings: ClassVar = (".pte",)
    packages: ClassVar = ("executorch",)
    extra: ClassVar = "executorch"
    runtime: ClassVar = "ExecuTorch"
    timed: ClassVar = True

    def write(self, job: Job) -> Written:
        """By `torch.export` and ExecuTorch.

        Raises:
            UserError: the model takes images and text at once, or can't be exported.
        """
        prepare(job, "ExecuTorch")
        delegated = _write(job.model, job.images, job.outputs, job.path, job.about)
        held = self.tensors(job.path).values()
        count, size = sum(t.numel() for t in held), self.held_bytes(job.path)
        return Written(len(held), count, size, {"delegated": delegated, "batch": 1})

    def write_plain(
        self, model: nn.Module, images: Tensor, path: Path, text: Tensor | None = None
    ) -> None:
        """With all outputs, in the same way."""
        with torch.no_grad():
            names = tuple(named_outputs(model(images)))
        _write(model, images, names, path, {})

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The constants, and what the delegate reads: flat, as it stores them."""
        from executorch.exir import schema

        found: dict[str, Tensor] = {}
        program, named = self._read(path)
        for plan in program.execution_plan:
            for value in plan.values:
                given = value.val
                if isinstance(given, schema.Tensor) and given.data_buffer_idx > 0:
                    data = bytes(program.constant_buffer[given.data_buffer_idx].storage)
                    if given.allocation_info is None and data:
                        kind = _KINDS.get(given.scalar_type.name)
                        name = f"constant/{given.data_buffer_idx}"
                        found[name] = _tensor(path, data, kind, given.sizes)
        for key, data in named.items():
            found[f"data/{key}"] = _tensor(path, data, torch.float32, None)
        return found

    def held_bytes(self, path: Path) -> int:
        """Of constants and data, and of what older releases put into the delegates' own part."""
        program, named = self._read(path)
        constants = sum(len(buffer.storage) for buffer in program.constant_buffer)
        inline = sum(_inline_bytes(d.data) for d in program.backend_delegate_data)
        return constants + inline + sum(map(len, named.values()))

    def _read(self, path: Path) -> tuple[Any, dict[str, bytes]]:
        self.check()
        with quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary

            try:
                found = deserialize_pte_binary(path.read_bytes())
                stored = found.named_data
                if stored is None:
                    return found.program, {}
                entries = stored.pte_data
                # Keys with the same bytes share one buffer.
                by_buffer = {e.buffer_index: key for key, e in entries.items()}
                return found.program, {k: bytes(stored.buffers[i]) for i, k in by_buffer.items()}
            except _DAMAGED as error:
                raise unreadable(path, "a program of ExecuTorch", error) from error

    def opened(
        self, path: Path, threads: int = 0, *, lean: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """By ExecuTorch's own runtime, image by image."""
        with quiet():
            from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
            from executorch.runtime import Runtime

            if threads:
                _unsafe_reset_threadpool(threads)
            try:
                data = path.read_bytes()
                program = Runtime.get().load_program(data)
                about, method = (program.load_method(name) for name in (_ABOUT, _METHOD))
                if about is None or method is None:
                    raise ValueError("it was not written by tiedconv")
                names = json.loads(str(about.execute(())[0]))["outputs"]
            except _DAMAGED as error:
                raise unreadable(path, "a program of ExecuTorch", error) from error

        def run(images: Tensor, _held: object = (data, program)) -> dict[str, Tensor]:
            # The runtime reads the bytes in place, and keeps no reference to them.
            rows = [method.execute((image[None].contiguous(),)) for image in images]
            parts = zip(names, zip(*rows, strict=True), strict=True)
            return {name: torch.cat([t.clone() for t in part]) for name, part in parts}

        return run

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """See `opened`."""
        self._read(path)  # the runtime would end the process on some damaged files
        return self.opened(path)(images)


_KINDS = {
    "FLOAT": torch.float32, "DOUBLE": torch.float64, "HALF": torch.float16, "LONG": torch.int64,
    "INT": torch.int32, "SHORT": torch.int16, "CHAR": torch.int8, "BYTE": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def _tensor(path: Path, data: bytes, kind: torch.dtype | None, shape: list[int] | None) -> Tensor:
    if kind is None:
        kind, shape = torch.uint8, None
    if len(data) % kind.itemsize:
        kind = torch.uint8
    if shape is not None:
        data = data[: math.prod(shape) * kind.itemsize]  # it is followed by padding
    flat = torch.frombuffer(bytearray(data), dtype=kind)
    try:
        return flat if shape is None else flat.reshape(shape)
    except RuntimeError as error:
        raise unreadable(path, "a program of ExecuTorch", error) from error


def _inline_bytes(data: bytes) -> int:
    """Constants that a delegate of XNNPACK holds itself, by its header."""
    is_known = len(data) >= 30 and bytes(data[4:8]) == b"XH00"
    return int.from_bytes(data[22:30], "little") if is_known else 0


def _write(
    model: nn.Module, images: Tensor, outputs: tuple[str, ...], path: Path, about: Any
) -> int:  # fmt: skip
    """Write a program; returns the number of its calls of the delegate."""
    record = {"version": __version__, "outputs": list(outputs), **about}
    with quiet():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        with refusals("ExecuTorch", "--to onnx or --to pt2"):
            edge = to_edge_transform_and_lower(
                one_image_program(model, images, outputs),
                partitioner=[partitioner()],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
                constant_methods={_ABOUT: json.dumps(record, ensure_ascii=False)},
            )
            calls = [n for n in edge.exported_program().graph.nodes if "delegate" in str(n.target)]
            data = edge.to_executorch().buffer
    path.write_bytes(data)
    return sum(n.op == "call_function" for n in calls)


FORMAT = ExecuTorch()
