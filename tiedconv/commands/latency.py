"""The time of a model that a budget limits: of its layers, and of a whole plan, before the fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tiedconv.conversion.candidates import memory_store
from tiedconv.conversion.pipeline import Planned
from tiedconv.conversion.tensor_store import TensorStore
from tiedconv.conversion.workload import Counted
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.planner import Outline, choose_ranks
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.macs import work_of
from tiedconv.timing import Rehearsed, TimeTable, corrected, measure_times, time_of_plan
from tiedconv.timing.table import OnSite

CLOSE = 0.04
"""A measured time that differs by less, of the predicted one, corrects nothing: runs vary as much.
"""
REHEARSALS = 2
LEAST, MOST = 0.5, 2.0
"""By which what layers save is multiplied at a time."""


OnRehearsal = Callable[[int], None]
"""Called with the number of the model of a plan that is timed next, from 1."""

Planning = Callable[[TimeTable | None], Planned]
"""Plans a recipe by times; None without a budget of time."""


def in_time(
    model: nn.Module,
    found: Counted | None,
    recipe: Recipe,
    planning: Planning,
    on_site: OnSite | None = None,
    on_rehearsal: OnRehearsal | None = None,
    *,
    rehearse: bool = True,
) -> tuple[Planned, TimeTable | None]:
    """Plan a recipe, by the times of the model's layers where it limits time; these times.

    A search takes the layers that seem to gain most, so its plan takes longer than they say. A
    model of such a plan is timed, its ranks chosen by the weights alone, and what layers save is
    scaled to it.

    Args:
        model: plain; it is given values where it has none.
        found: its multiply-adds, and the input that they were counted on.
        recipe: says what time, and where.
        planning: plans it.
        on_site: see `measure_times`.
        on_rehearsal: see `OnRehearsal`.
        rehearse: whether to time such a plan; the model has its weights then.

    Raises:
        BudgetError: the model can't be run on any input, or not on so many (`latency-unknown`), or
            the budget can't be met (`latency-too-low`).
    """
    if recipe.latency is None:
        return planning(None), None
    if found is None:
        raise BudgetError(
            "The time of this model can't be measured: it runs on no input that was tried",
            f"latency={recipe.latency.text!r} means nothing without it",
            "Give an example of its input (in Python: example=...), or ask for --params instead",
            code="latency-unknown",
        )
    _fill(model)
    on = recipe.on
    times = measure_times(
        model, found.workload, on.runtime, on.batch_size, on.threads,
        arguments=found.arguments, on_site=on_site,
    )  # fmt: skip
    if not rehearse:
        return planning(times), times
    return _rehearsed(model, found, times, planning, on_rehearsal)


def _rehearsed(
    model: nn.Module,
    found: Counted,
    times: TimeTable,
    planning: Planning,
    on_rehearsal: OnRehearsal | None,
) -> tuple[Planned, TimeTable]:
    """Plan by times that a whole model of such a plan has corrected; these times."""
    planned = planning(times)
    store = memory_store(model, planned.info)
    for number in range(REHEARSALS):
        if on_rehearsal is not None:
            on_rehearsal(number + 1)
        limited = [one for one in planned.outlines if one.work is not None]
        seen = _rehearsal(model, found, times.workload, planned.info, limited[0], store)
        times = dataclasses.replace(times, rehearsed=(*times.rehearsed, seen))
        if seen.measured is None or abs(seen.measured / seen.predicted - 1) <= CLOSE:
            break
        factor = (1 - seen.measured) / (1 - seen.predicted)
        workload = corrected(times.workload, min(MOST, max(LEAST, factor)))
        times = dataclasses.replace(times, workload=workload)
        planned = planning(times)
    return planned, times


def _rehearsal(
    model: nn.Module, found: Counted, times: Workload, info: ModelInfo, outlined: Outline,
    store: TensorStore,
) -> Rehearsed:  # fmt: skip
    """A plan that meets the budget by the times of layers, timed as a whole."""
    plan, on = choose_ranks(info, outlined, store.open().editor, {}), outlined.recipe.on
    measured = time_of_plan(
        model, plan, found.arguments, on.runtime, on.batch_size, on.threads
    )  # fmt: skip
    return Rehearsed(work_of(plan.weights, times) / times.total, measured)


def _fill(model: nn.Module) -> None:
    """Give tensors without memory values, in place: a plan without weights is timed with any."""
    filled: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.is_meta:
                    made: Tensor = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                    held[name] = filled.setdefault(id(tensor), made)  # type: ignore[assignment]
