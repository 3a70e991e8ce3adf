"""torch's own exported program."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.errors import CheckpointError
from tiedconv.exporters._format import (
    Format,
    Job,
    Outputs,
    Written,
    named_inputs,
    refusals,
    unreadable,
)
from tiedconv.exporters._pt2_safety import checked_archive
from tiedconv.runtime.forward_check import is_out_of_memory
from tiedconv.runtime.outputs import named_outputs


class Pt2(Format):
    """A graph of torch operators over the stored tensors; running it needs torch alone.

    Weights are computed from the factors in each run, so memory stays compact. The batch size is
    dynamic.
    """

    name: ClassVar = "pt2"
    endings: ClassVar = (".pt2",)
    opens: ClassVar = True

    def write(self, job: Job) -> Written:
        """By `torch.export`.

        Raises:
            UserError: torch can't export this model.
        """
        batch = torch.export.Dim("batch")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about itself
            with refusals("torch.export", "--to dense"):
                program = torch.export.export(
                    Outputs(job.model, job.outputs, dict),
                    tuple(job.inputs.values()),
                    dynamic_shapes=tuple({0: batch} for _ in job.inputs),
                    strict=False,
                )
            strip(program)
            torch.export.save(program, job.path)
        held = {id(t.untyped_storage()): t for t in program.state_dict.values()}
        constants = (t for t in program.constants.values() if isinstance(t, Tensor))
        return Written.of([*held.values(), *constants])

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Parameters, buffers and constants."""
        program = _opened(path)
        constants = {n: t for n, t in program.constants.items() if isinstance(t, Tensor)}
        return {**program.state_dict, **constants}

    def run(self, path: Path, images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
        """By `torch.export.load`."""
        return self.opened(path)(images, text)

    def opened(
        self, path: Path, threads: int = 0, *, lean: bool = False
    ) -> Callable[..., dict[str, Tensor]]:
        """By `torch.export.load`; threads are those of torch."""
        del threads, lean
        module = _opened(path).module()

        def run(images: Tensor, text: Tensor | None = None) -> dict[str, Tensor]:
            with torch.no_grad():
                return named_outputs(module(*named_inputs(images, text).values()))

        return run


def _opened(path: Path) -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with silent():
                program = torch.export.load(checked_archive(path))
            program._guards_code = []  # Python text that running it would execute
            return program
        except CheckpointError:
            raise
        except Exception as error:  # a damaged archive may fail anywhere: no common base
            if is_out_of_memory(error):
                raise
            raise unreadable(path, "an exported program of torch", error) from error


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it, torch logs nothing: of a damaged file only the error is shown."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it, converters neither warn nor log nor draw progress bars."""
    with warnings.catch_warnings(), silent(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def strip(program: torch.export.ExportedProgram) -> None:
    """Remove the example inputs, and the stack traces, which hold paths of this machine."""
    program._example_inputs = None
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
                node.meta.pop(key, None)


FORMAT = Pt2()
