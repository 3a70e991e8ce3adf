"""Budgets of bytes in the verb `plan`: how many bits each number gets, and what rounding costs.

A file of some bytes holds many numbers in few bits, or fewer numbers in more: the whole model, or
schemes at several fractions of its parameters. `convert --bytes` tries the same plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiedconv.conversion.byte_plans import PlanForecast, bits_of
from tiedconv.conversion.candidates import by_alignment
from tiedconv.conversion.cost_estimate import CostEstimator, key_of
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.byte_budget import ByteBudget, byte_budget, byte_outlines
from tiedconv.planning.planner import Outline
from tiedconv.planning.recipe import Recipe

WHOLE = "100%"
"""Of the parameters: the whole model, rounded."""

OnPlan = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ByteCell:
    """One budget of bytes, met by one fraction of the parameters.

    Args:
        budget: as it was asked for, such as `10%`.
        bytes: of the file.
        params: the fraction of the parameters that is kept, such as `50%`.
        stored: parameters.
        bits: that each of them has on average.
        scheme: the one of the least cost, None without images, and for the whole model.
        cost: expected KL divergence from the original's outputs, in nats for each image, once the
            plan is fitted and rounded; None without images.
        best: whether no other plan of this budget costs less.
    """

    budget: str
    bytes: int
    params: str
    stored: int
    bits: float
    scheme: str | None = None
    cost: float | None = None
    best: bool = False


def compare_bytes(
    info: ModelInfo,
    budgets: Sequence[str],
    original: int,
    estimator: CostEstimator | None,
    on_plan: OnPlan | None = None,
) -> tuple[ByteCell, ...]:
    """The plans that `convert --bytes` tries at each budget.

    Args:
        info: of the model.
        budgets: such as `10%` or `2MB`.
        original: bytes of the original's tensors, in their own type.
        estimator: fits plans to the weights by images; None without any.
        on_plan: called with (plans done, plans in all, what comes next).

    Raises:
        RecipeError: a budget that is none, or saves nothing.
        NothingToConvert, BudgetError: no plan can meet a budget.
    """
    resolved = {text: byte_budget(text, original) for text in budgets}
    tried = [
        (text, budget, outlined)
        for text, budget in resolved.items()
        for outlined in byte_outlines(info, Recipe.of("auto", bytes=text), budget)
    ]
    if estimator is None:
        return tuple(_each_share([_cell(t, b, o) for t, b, o in tried]))
    costs = _forecasts([o for _, _, o in tried], estimator, on_plan)
    cells = [
        dataclasses.replace(
            _cell(text, budget, outlined),
            scheme=_scheme(outlined),
            cost=costs[_key(outlined)].cost_at(budget.bytes),
        )
        for text, budget, outlined in tried
    ]
    return tuple(_marked(_each_share(cells)))


def _cell(text: str, budget: ByteBudget, outlined: Outline) -> ByteCell:
    kept = outlined.recipe.budget
    bits = bits_of(outlined.plan, budget.bytes)
    share = WHOLE if kept is None else kept.text
    return ByteCell(text, budget.bytes, share, outlined.plan.stored, bits)


def _scheme(outlined: Outline) -> str | None:
    """What shares or thins the weights; None for the whole model."""
    return None if not outlined.tasks else outlined.recipe.rules[0].scheme


def _key(outlined: Outline) -> str:
    """The same for a plan at every budget of bytes: rounding alone differs."""
    return key_of(dataclasses.replace(outlined.recipe, bytes=None)) + str(bool(outlined.tasks))


def _forecasts(
    outlined: Sequence[Outline], estimator: CostEstimator, on_plan: OnPlan | None
) -> dict[str, PlanForecast]:
    """Each plan once, those that align alike together: statistics are measured once."""
    each = list({_key(one): one for one in outlined}.values())
    found: dict[str, PlanForecast] = {}
    for done, i in enumerate(by_alignment(each)):
        one, kept = each[i], each[i].recipe.budget
        if on_plan is not None:
            name = _scheme(one) or "the whole model"
            on_plan(done, len(each), name if kept is None else f"{name} at {kept.text}, rounded")
        found[_key(one)] = estimator.forecast(one)
    return found


def _each_share(cells: Sequence[ByteCell]) -> list[ByteCell]:
    """Of each budget and fraction the cell of the least cost; the first one without costs."""
    found: dict[tuple[str, str], ByteCell] = {}
    for cell in cells:
        known = found.setdefault((cell.budget, cell.params), cell)
        if cell.cost is not None and known.cost is not None and cell.cost < known.cost:
            found[cell.budget, cell.params] = cell
    return list(found.values())


def _marked(cells: Sequence[ByteCell]) -> list[ByteCell]:
    """The cells with the lowest cost of each budget marked."""

    def is_best(cell: ByteCell) -> bool:
        costs = [c.cost for c in cells if c.budget == cell.budget and c.cost is not None]
        return cell.cost is not None and cell.cost <= min(costs)

    return [dataclasses.replace(cell, best=is_best(cell)) for cell in cells]
