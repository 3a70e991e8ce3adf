"""Core ML: a model package in a zip archive, for Apple's devices."""

from __future__ import annotations

import json
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiedconv.exporters._format import Format, Job, Written, refusals, unreadable
from tiedconv.exporters._one_image import one_image_program, prepare
from tiedconv.exporters.pt2 import quiet
from tiedconv.version import __version__

_FOLDED = 256
"""Values of a constant above which nothing is computed from it ahead of time."""

_PACKAGE, _SENTINEL = "model.mlpackage", 0xDEADBEEF


class CoreMl(Format):
    """A package of one image at a time, `model.mlpackage`, zipped; it can be converted anywhere.

    Core ML runs on Apple's devices alone, so outputs are not compared.
    """

    name: ClassVar = "coreml"
    endings: ClassVar = (".zip",)
    packages: ClassVar = ("coremltools",)
    extra: ClassVar = "coreml"
    runtime: ClassVar = "Core ML"

    def write(self, job: Job) -> Written:
        """By coremltools, without the passes that store a weight and its transpose.

        Raises:
            UserError: the model takes images and text at once, or can't be converted.
        """
        prepare(job, "Core ML")
        with (
            refusals("coremltools", "--to executorch or --to onnx"),
            quiet(),
            tempfile.TemporaryDirectory(dir=job.folder) as folder,
        ):
            package = Path(folder) / _PACKAGE
            _converted(job).save(str(package))
            _zip(package, job.path)
        held = self.tensors(job.path).values()
        count = sum(t.numel() for t in held)
        return Written(len(held), count, self.held_bytes(job.path), {"batch": 1})

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """The constants of the program that have their values in the package's weights."""
        self.check()
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        try:
            with quiet(), zipfile.ZipFile(path) as archive:
                from coremltools.proto import Model_pb2

                spec = Model_pb2.Model.FromString(archive.read(_member(archive, ".mlmodel")))
                weights = archive.read(_member(archive, "weight.bin"))
            # Equal constants share a place: they are one tensor.
            places = {at: (name, shape) for name, at, shape in _stored(spec)}
            return {name: _tensor(weights, at, shape) for at, (name, shape) in places.items()}
        except (
            OSError, ValueError, RuntimeError, struct.error, zipfile.BadZipFile, DecodeError,
        ) as error:  # fmt: skip
            raise unreadable(path, "a zipped package of Core ML", error) from error

    def why_not_run(self) -> str:
        """It takes one of Apple's devices."""
        return "Core ML runs on Apple's devices alone; compare them there, as docs/edge.md shows"

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """Not possible."""
        raise NotImplementedError


def _converted(job: Job) -> Any:
    import coremltools as ct

    passes = ct.PassPipeline.DEFAULT
    # Else a tied matrix and its transpose are two constants.
    passes.set_options("common::const_elimination", {"skip_const_by_size": str(_FOLDED)})
    passes.remove_passes({"common::fuse_matmul_weight_bias"})
    program = one_image_program(job.model, job.images, job.outputs).run_decompositions({})
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:  # coremltools knows no such operator
            node.replace_all_uses_with(node.all_input_nodes[0])
            program.graph.erase_node(node)
    (given,) = job.inputs
    names = [name.replace(".", "_") for name in job.outputs]
    model = ct.convert(
        program,
        convert_to="mlprogram",
        inputs=[ct.TensorType(name=given, shape=tuple(job.images[:1].shape))],
        outputs=[ct.TensorType(name=name) for name in names],
        compute_precision=ct.precision.FLOAT32,
        minimum_deployment_target=ct.target.iOS17,
        pass_pipeline=passes,
        skip_model_load=True,
    )
    model.user_defined_metadata["tiedconv"] = __version__
    for name, value in job.about.items():
        model.user_defined_metadata[name] = json.dumps(value, ensure_ascii=False)
    return model


def _zip(package: Path, to: Path) -> None:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(package.rglob("*")):
            if file.is_file():
                archive.write(file, str(file.relative_to(package.parent)))


def _member(archive: zipfile.ZipFile, ending: str) -> str:
    for name in archive.namelist():
        if name.endswith(ending):
            return name
    raise ValueError(f"it has no {ending}")


def _tensor(weights: bytes, at: int, shape: tuple[int, ...]) -> Tensor:
    """The tensor whose entry is at a place of the weights, see MIL's blob storage."""
    sentinel, kind, size, start = struct.unpack_from("<IIQQ", weights, at)
    if sentinel != _SENTINEL or start + size > len(weights):
        raise ValueError("its weights have no entry where the program reads one")
    data = bytearray(weights[start : start + size])
    dtype = {1: torch.float16, 2: torch.float32}.get(kind)
    if dtype is None:
        return torch.frombuffer(data, dtype=torch.uint8)
    return torch.frombuffer(data, dtype=dtype).reshape(shape)


def _stored(spec: Any) -> list[tuple[str, int, tuple[int, ...]]]:
    """Name, place and shape of each constant of a program that lies in the weights."""
    found = []
    for function in spec.mlProgram.functions.values():
        for block in function.block_specializations.values():
            for operation in block.operations:
                value = operation.attributes.get("val") if operation.type == "const" else None
                if value is not None and value.WhichOneof("value") == "blobFileValue":
                    sides = value.type.tensorType.dimensions
                    shape = tuple(side.constant.size for side in sides)
                    name = operation.outputs[0].name
                    found.append((name, value.blobFileValue.offset, shape))
    return found


FORMAT = CoreMl()
