"""OpenVINO's pair of files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.exporters._format import Format, Job, Written, named_inputs, unreadable
from tiedconv.exporters.onnx import FORMAT as ONNX


class OpenVino(Format):
    """A graph in XML and its tensors in a companion file, converted from the ONNX form."""

    name: ClassVar = "openvino"
    endings: ClassVar = (".xml",)
    dtypes: ClassVar = ("float32", "float16")
    packages: ClassVar = ("openvino", *ONNX.packages)
    extra: ClassVar = "openvino"

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
        """By OpenVINO on the CPU, in float32: by default it uses bfloat16 where the CPU has it."""
        import openvino as ov

        try:
            compiled = ov.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise unreadable(path, "an OpenVINO model", error) from error
        found = compiled({n: t.numpy() for n, t in named_inputs(images, text).items()})
        return {port.get_any_name(): torch.from_numpy(found[port]) for port in compiled.outputs}


FORMAT = OpenVino()
