"""OpenVINO's pair of files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tiedconv.exporters._format import Format, Job, Written, named_inputs, unreadable
from tiedconv.exporters.onnx import FORMAT as ONNX
from tiedconv.exporters.onnx import write_dense


class OpenVino(Format):
    """A graph in XML and its tensors in a companion file, converted from the ONNX form."""

    name: ClassVar = "openvino"
    endings: ClassVar = (".xml",)
    dtypes: ClassVar = ("float32", "float16")
    packages: ClassVar = ("openvino", *ONNX.packages)
    extra: ClassVar = "openvino"
    runtime: ClassVar = "OpenVINO"
    opens: ClassVar = True
    timed: ClassVar = True

    def write(self, job: Job) -> Written:
        """The companion file is measured: OpenVINO may store folded constants."""
        import openvino as ov

        between = dataclasses.replace(job, name=f"{job.path.stem}.onnx")
        written = ONNX.write(between)
        # Not convert_model: its transformations store the transpose of a tied matrix as well.
        model = ov.Core().read_model(between.path)
        for name, value in job.about.items():
            model.set_rt_info(json.dumps(value, ensure_ascii=False), ["model_info", name])
        ov.save_model(model, job.path, compress_to_fp16=False)
        between.path.unlink()
        size = job.path.with_suffix(".bin").stat().st_size
        return dataclasses.replace(written, weight_bytes=size)

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The constants of the graph."""
        self.check()
        import openvino as ov

        try:
            operations = ov.Core().read_model(path).get_ordered_ops()
        except RuntimeError as error:
            raise unreadable(path, "an OpenVINO model", error) from error
        constants = [op for op in operations if op.get_type_name() == "Constant"]
        return {op.get_friendly_name(): torch.from_numpy(op.data.copy()) for op in constants}

    def held_bytes(self, path: Path) -> int:
        """Of the companion file, which holds all constants."""
        return path.with_suffix(".bin").stat().st_size

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """By OpenVINO on the CPU, in float32.

        By default it uses bfloat16 where the CPU has it, and there rounds features to 8 bits before
        they are multiplied by integers.
        """
        return self.opened(path)(images, text)

    def opened(
        self, path: Path, threads: int = 0, *, lean: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """The model, compiled; a function from images, and text if it takes any, to outputs."""
        import openvino as ov

        how = {
            "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": threads,
        }  # fmt: skip
        try:
            compiled = ov.compile_model(path, "CPU", how)
        except RuntimeError as error:
            raise unreadable(path, "an OpenVINO model", error) from error
        names = {port: port.get_any_name() for port in compiled.outputs}

        def run(images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
            found = compiled({n: t.numpy() for n, t in named_inputs(images, text).items()})
            return {name: torch.from_numpy(found[port]) for port, name in names.items()}

        return run

    def write_plain(
        self, model: nn.Module, images: Tensor, path: Path, text: Tensor | None = None
    ) -> None:
        """The same way through ONNX."""
        import openvino as ov

        between = path.with_suffix(".onnx")
        write_dense(model, named_inputs(images, text), between)
        ov.save_model(ov.Core().read_model(between), path, compress_to_fp16=False)
        between.unlink()


FORMAT = OpenVino()
