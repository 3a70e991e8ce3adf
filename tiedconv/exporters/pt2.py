"""torch's own exported program."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.errors import CheckpointError, UserError
from tiedconv.exporters._format import Format, Job, Written
from tiedconv.exporters._onnx_graph import Logits


class Pt2(Format):
    """A graph of torch operators over each stored tensor; it needs torch alone.

    Weights are computed from the factors in each run, so memory stays compact. Any number of
    images is taken.
    """

    name: ClassVar = "pt2"
    endings: ClassVar = (".pt2",)

    def write(self, job: Job) -> Written:
        """By `torch.export`.

        Raises:
            UserError: torch can't export this model.
        """
        batch = torch.export.Dim("batch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            try:
                program = torch.export.export(
                    Logits(job.model), (job.images,), dynamic_shapes=({0: batch},), strict=False
                )
            except Exception as error:  # whatever the exporter makes of a model's own code
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(
                    f"torch can't export this model ({reason})",
                    "Nothing was written",
                    "Export it with --to dense",
                ) from None
            _strip(program)
            torch.export.save(program, job.path)
        held = {id(t.untyped_storage()): t for t in program.state_dict.values()}
        tensors = [*held.values(), *(t for t in program.constants.values() if _is_tensor(t))]
        numbers = sum(t.numel() for t in tensors)
        return Written(len(tensors), numbers, sum(t.nbytes for t in tensors))

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Parameters, buffers and constants."""
        program = _opened(path)
        constants = {n: t for n, t in program.constants.items() if isinstance(t, Tensor)}
        return {**program.state_dict, **constants}

    def run(self, path: Path, images: Tensor) -> Tensor | None:
        """By `torch.export.load`."""
        with torch.no_grad():
            found: Tensor = _opened(path).module()(images)
        return found


def _opened(path: Path) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.export.load(path)
        except Exception as error:  # whatever a damaged archive makes of it
            raise CheckpointError(
                f"{path} is no exported program that torch can load",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
                "Export it again",
            ) from None


def _strip(program: torch.export.ExportedProgram) -> None:
    """Leave out the example, and the trace of who called what: it names this machine's paths."""
    program._example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


FORMAT = Pt2()
