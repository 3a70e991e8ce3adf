"""The time of a model that a budget limits: of its layers before, of the file afterwards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tiedconv.conversion.workload import Counted
from tiedconv.errors import BudgetError
from tiedconv.planning.recipe import Recipe
from tiedconv.timing import TimeTable, measure_times
from tiedconv.timing.table import OnSite


def times_of(
    model: nn.Module, found: Counted | None, recipe: Recipe, on_site: OnSite | None = None
) -> TimeTable | None:
    """The times of a model's layers, where a recipe limits its time.

    Args:
        model: plain; it is given values where it has none.
        found: its multiply-adds, and the input that they were counted on.
        recipe: says what time, and where.
        on_site: see `measure_times`.

    Raises:
        BudgetError: it can't be run on any input, or not on so many (`latency-unknown`).
    """
    if recipe.latency is None:
        return None
    if found is None:
        raise BudgetError(
            "The time of this model can't be measured: it runs on no input that was tried",
            f"latency={recipe.latency.text!r} means nothing without it",
            "Give an example of its input (in Python: example=...), or ask for --params instead",
            code="latency-unknown",
        )
    _fill(model)
    on = recipe.on
    return measure_times(
        model, found.workload, on.runtime, on.batch_size, on.threads,
        arguments=found.arguments, on_site=on_site,
    )  # fmt: skip


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
