"""A conversion, stage by stage: inspect, plan, align, measure, arrange, fit, tie, calibrate, write.

| stage | function | result |
|---|---|---|
| inspect | `families.inspect.inspect_model` | `ModelInfo`: names, shapes, facts about modules |
| plan | `planning.planner.outlines` | `Outline`s: the recipe and its alternatives, their sizes |
| align | `conversion.stages.align` | `Workspace`: the weights where the schemes fit best |
| measure | `conversion.stages.measure` | `KfacStatistics` of activations and gradients, on images |
| arrange | `conversion.stages.arrange` | the weights and statistics, ordered by importance |
| fit | `conversion.stages.fit` | `Fit`: ranks and factors; stored <= asked holds from here on |
| tie | `runtime.tie.tie` | the model, its weights computed from the factors |
| calibrate | `conversion.candidates.calibrate_shortlist` | reconstructed block by block |
| write | `io.checkpoint` | one file, checked and read back before it gets its name |

Align, measure, arrange and fit run once for each candidate; all else runs once. Weights in memory
and weights on disk differ in their `TensorStore` alone.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.conversion.byte_search import convert_to_bytes
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import (
    calibrate_shortlist,
    fit_candidates,
    memory_store,
    shortlist,
    tie_fit,
)
from tiedconv.conversion.captured_inputs import require_example
from tiedconv.conversion.fit import Fit, OnGroup
from tiedconv.conversion.sample_inputs import calibration_samples
from tiedconv.conversion.streaming import (
    LARGE,
    StreamedStore,
    return_freed_memory,
    scratch_errors,
)
from tiedconv.conversion.symmetry_proof import SymmetryProof, first_image
from tiedconv.conversion.workload import count_macs
from tiedconv.core.plan import Plan
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.planning.byte_budget import ByteBudget, byte_budget, byte_outlines
from tiedconv.planning.planner import Outline, chooses_by_size, outlines
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.call_hooks import hooked, text_hooks
from tiedconv.runtime.example_inputs import Example
from tiedconv.runtime.macs import work_of
from tiedconv.runtime.tie import set_state, tie
from tiedconv.sources import LazyWeights, Source
from tiedconv.utils.stage import enter
from tiedconv.version import __version__


@dataclass(frozen=True)
class Planned:
    """A model that was inspected, and a recipe that was planned on it.

    Args:
        info: names, shapes and facts about modules.
        outlines: the recipe and its alternatives, those that can be carried out.
        budget: bytes of the file, where the recipe has such a budget.
        example: an input of the model, to prove symmetries on where there are no images.
    """

    info: ModelInfo
    outlines: tuple[Outline, ...]
    budget: ByteBudget | None = None
    example: Example | None = None

    @property
    def sketch(self) -> Plan:
        """The plan without weights: exact, but for what a budget leaves to the weights."""
        return self.outlines[0].plan


def plan_on(
    model: nn.Module,
    recipe: Recipe,
    source: Source | None = None,
    example: Example | None = None,
    *,
    measured: bool = False,
    workload: Workload | None = None,
    times: Workload | None = None,
) -> Planned:
    """Inspect a model and plan a recipe on it; what can't be done is refused here.

    Args:
        model: plain; its parameters may be on the meta device.
        recipe: what is wanted.
        source: where it came from, which tells in what type its weights are published.
        example: an input of the model.
        measured: whether images will show what an error costs. Without, a budget takes a
            classifier and other matrices that match no other only if the recipe names them, or if
            it can't be met without them: by the plain distance they look as others do, and an
            error in them costs ten times as much.
        workload: multiply-adds of the model, where they were counted; a recipe that limits them
            counts them itself.
        times: of the model in nanoseconds, for a recipe that limits them.

    Raises:
        NothingToConvert, BudgetError: the recipe can't be carried out.
        UserError: the model can't be run on the example (`example-rejected`).
    """
    if example is not None:
        require_example(model, example)
    if workload is None and recipe.macs is not None:
        workload = count_macs(model, source, example)
    info = dataclasses.replace(inspect_model(model), workload=workload, times=times)
    if recipe.bytes is None:
        return Planned(info, _outlines(info, recipe, measured), example=example)
    budget = byte_budget(recipe.bytes, original_bytes(info, source))
    return Planned(info, byte_outlines(info, recipe, budget), budget, example)


def original_bytes(info: ModelInfo, source: Source | None) -> int:
    """Bytes of a model's tensors in the type that its weights are published in."""
    half = source is not None and source.weights_dtype is not None
    return (2 if half else 4) * sum(math.prod(shape) for shape in info.shapes.values())


def stages_of(planned: Planned, calib: Calibration | None) -> tuple[str, ...]:
    """Names of the stages of a conversion that writes a file, for `utils.stage.stages`."""
    fits = calib is not None and calib.config.fits
    if planned.budget is None:
        return ("fit", *(("calibrate",) if calib is not None else ()), "write")
    rounded = ("round", *(("calibrate the rounded model",) if calib is not None else ()))
    return ("fit", *(("calibrate",) if fits else ()), *rounded, "write")


def _outlines(info: ModelInfo, recipe: Recipe, measured: bool) -> tuple[Outline, ...]:
    if chooses_by_size(recipe) and not measured:
        with suppress(NothingToConvert, BudgetError):
            return outlines(dataclasses.replace(info, cautious=True), recipe)
    return outlines(info, recipe)


def convert_in_memory(
    model: nn.Module,
    source: Source,
    planned: Planned,
    calib: Calibration | None = None,
    *,
    command: str | None = None,
    on_group: OnGroup | None = None,
) -> None:
    """Convert a model whose weights are in memory, in place.

    Args:
        model: of `planned`, with its weights.
        source: where it came from.
        planned: from `plan_on`.
        calib: images, if there are any.
        command: the command line, for the file's history.
        on_group: called with (groups fitted, groups in all).

    Raises:
        DataError: no image could be read.
        UserError: an interrupted run that is resumed is of another calibration.
    """
    with ExitStack() as stack:
        data = None
        if calib is not None:
            data = stack.enter_context(calibration_samples(model, calib, source))
        else:
            stack.enter_context(hooked(model, text_hooks(model)))
        fitted, extra = _carry_out(model, source, planned, calib, data, command, on_group)
    entry = history_entry(fitted, source, command, planned.info)
    set_state(model, history=({**entry, **extra},))


def _carry_out(
    model: nn.Module,
    source: Source,
    planned: Planned,
    calib: Calibration | None,
    data: Dataset[Any] | None,
    command: str | None,
    on_group: OnGroup | None,
) -> tuple[Fit, Mapping[str, Any]]:
    """Convert with images or without, to a number of bytes or not.

    Returns:
        what the model is tied by, and what the history says of a calibration.
    """
    info, candidates, record = planned.info, planned.outlines, source.to_json()
    enter("fit")
    if planned.budget is not None:
        sketch = Fit(candidates[0].recipe, planned.sketch, 0.0, None, {})
        entry = history_entry(sketch, source, command, info)
        example = planned.example if data is None else first_image(data)
        store = memory_store(model, info, lambda: example)
        return convert_to_bytes(
            model, info, candidates, planned.budget, store, source, entry, calib, data, on_group
        )
    if calib is None or data is None:
        in_place = len(candidates) == 1
        store = memory_store(model, info, lambda: planned.example, in_place=in_place)
        (fitted,) = fit_candidates(info, candidates, store, on_group=on_group)
        tie_fit(model, fitted, record)
        return fitted, {}
    original = copy.deepcopy(model)  # before aligning, which may change the model's tensors
    found = shortlist(model, original, info, candidates, calib, data, record, on_group)
    enter("calibrate")
    return calibrate_shortlist(model, original, found, calib, data, record)


@contextmanager
def fit_streamed(
    model: nn.Module,
    planned: Planned,
    tensors: LazyWeights,
    output: Path,
    on_group: OnGroup | None = None,
    *,
    own_process: bool = False,
) -> Iterator[Fit]:
    """The best fit of weights that are read tensor by tensor; its tensors are on disk.

    Args:
        model: of `planned`, its parameters on the meta device; it is tied as a check.
        planned: from `plan_on`.
        tensors: the weights.
        output: the file to write; beside it there must be space for scratch files.
        on_group: called with (groups fitted, groups in all).
        own_process: whether the memory allocator of the process may be changed for good, so that
            large weights take less memory.

    Raises:
        OutputError: there is no space (`scratch-full`).
        WeightsError: the weights' files changed meanwhile.
    """
    shapes = planned.info.shapes
    size = sum(math.prod(shapes[name]) * dtype.itemsize for name, dtype in tensors.dtypes.items())
    if own_process and size > LARGE:
        return_freed_memory()
    store = StreamedStore(tensors, output.parent, SymmetryProof(planned.info, None))
    enter("fit")
    with scratch_errors(output):
        (fitted,) = fit_candidates(planned.info, planned.outlines, store, on_group=on_group)
        try:
            empty = {n: torch.empty(s, device="meta") for n, s in fitted.plan.factors.items()}
            tie(model, fitted.plan, empty)  # refuses now what could not be tied when it is loaded
            yield fitted
        finally:
            fitted.close()


def macs_record(plan: Plan, workload: Workload) -> dict[str, Any]:
    """What the history says of multiply-adds: before, after, and on which input."""
    return {
        "original": workload.total,
        "converted": work_of(plan.weights, workload),
        "inputs": [list(shape) for shape in workload.inputs],
    }


def latency_record(recipe: Recipe, plan: Plan, times: Workload) -> dict[str, Any]:
    """What the history says of the time of a forward pass: before, and after as predicted."""
    return {
        **recipe.on.to_json(),
        "original_ns": times.total,
        "predicted_ns": work_of(plan.weights, times),
    }


def history_entry(
    fitted: Fit, source: Source, command: str | None, info: ModelInfo
) -> dict[str, Any]:
    """The history's record of a conversion, which says in what type weights are stored."""
    workload, times = info.workload, info.times
    half = "float16" if fitted.recipe.bytes is not None else source.weights_dtype
    return {
        "step": "convert",
        "recipe": fitted.recipe.to_json(),
        "command": command,
        "original": fitted.plan.original,
        "stored": fitted.plan.stored,
        "symmetries": fitted.symmetries,
        **({} if workload is None else {"macs": macs_record(fitted.plan, workload)}),
        **({} if times is None else {"latency": latency_record(fitted.recipe, fitted.plan, times)}),
        **({} if half is None else {"stored_as": half, "computes_in": "float32"}),
        "versions": {"tiedconv": __version__, "torch": str(torch.__version__)},
    }
