"""Plans that may meet a budget of bytes best: how much to share, and in how many bits to store it.

Each plan (the whole model; schemes at several numbers of parameters) is fitted, and the cost of
rounding it to the budget is forecast. Both costs are in one unit (see `numerics.kfac_metric`), so
their sum ranks the plans.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from tiedconv.conversion.candidates import Shortlist, by_alignment
from tiedconv.conversion.fit import Fit, OnGroup, TooCostly
from tiedconv.conversion.rounding import Forecast
from tiedconv.conversion.stages import carry_out
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.tensor_store import TensorStore
from tiedconv.core.plan import Plan
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.budget import Budget
from tiedconv.planning.byte_budget import EACH, OVERHEAD, ByteBudget
from tiedconv.planning.drafting import parameters_of
from tiedconv.planning.planner import Outline, outline
from tiedconv.planning.rank_allocation import KfacMetrics
from tiedconv.utils.stage import enter_part

CLOSE_CALL = 1.3
"""A plan that is forecast to cost more than so many times the best is not compared. Forecasts are
for small errors: at few bits the outputs diverge three times as much, one scheme's more than
another's."""

FINER = (0.85, 1.17)
"""Times the parameters of the best plan: plans between those that are tried at first."""


@dataclass(frozen=True)
class Chosen:
    """A plan that was fitted, and may be the best.

    Args:
        fitted: its fit, in floats.
        metrics: of all weights, as it aligned them.
        forecast: its cost in all, at the budget.
    """

    fitted: Fit
    metrics: KfacMetrics
    forecast: float

    def close(self) -> None:
        """Let its tensors go."""
        self.fitted.close()


@dataclass(frozen=True)
class PlanForecast:
    """A plan that is fitted, and what rounding it will cost.

    Args:
        fitted: its fit, in floats.
        metrics: of all weights, as it aligned them; empty without images.
        forecast: of its rounding.
    """

    fitted: Fit
    metrics: KfacMetrics
    forecast: Forecast

    def cost_at(self, bytes_: int) -> float:
        """Nats for each image: of the fit, and of rounding it to so many bytes."""
        step = self.forecast.step_for(8 * (bytes_ - overhead(self.fitted.plan)))
        return self.fitted.cost + self.forecast.cost(step)


@torch.no_grad()
def forecast_plan(
    info: ModelInfo,
    outlined: Outline,
    store: TensorStore,
    cache: StatisticsCache | None,
    on_group: OnGroup | None = None,
    limit: float = math.inf,
) -> PlanForecast:
    """Fit a plan and forecast its rounding.

    Args:
        info: of the model.
        outlined: the plan.
        store: the weights.
        cache: measures statistics on images; None without any.
        on_group: called with (groups fitted, groups in all).
        limit: of the cost.

    Raises:
        TooCostly: the fit alone costs as much as `limit`.
    """
    found, statistics = carry_out(info, outlined, store, cache, on_group, limit)
    metrics = {} if statistics is None else statistics.metrics
    return PlanForecast(found, metrics, Forecast(found.plan, found.tensors, metrics))


@torch.no_grad()
def choose_plans(
    info: ModelInfo,
    outlined: Sequence[Outline],
    budget: ByteBudget,
    store: TensorStore,
    cache: StatisticsCache | None,
    on_group: OnGroup | None = None,
    most: int = 1,
) -> tuple[list[Chosen], int]:
    """Fit each plan, forecast its cost at the budget, and keep the best.

    Args:
        info: of the model.
        outlined: the plans.
        budget: of bytes.
        store: the weights.
        cache: measures statistics on images; None without any.
        on_group: called with (groups fitted, groups in all), for each plan.
        most: plans to return at most; others than the best are nearly as good.

    Returns:
        the plans, that of the least cost first, and how many were tried.
    """
    best = Shortlist[Chosen](most, CLOSE_CALL)
    tried = 0

    def try_all(plans: Sequence[Outline]) -> None:
        nonlocal tried
        for number, i in enumerate(by_alignment(plans), 1):
            enter_part(number, len(plans))
            tried += 1
            try:
                found = forecast_plan(info, plans[i], store, cache, on_group, best.limit)
            except TooCostly:
                continue  # before any rounding it costs more than another plan with it
            cost = found.cost_at(budget.bytes)
            best.add(Chosen(found.fitted, found.metrics, cost), cost, tried)

    try_all(outlined)
    assert best.entries  # there is a plan, or the recipe was refused
    try_all(_finer(info, best.entries[0], outlined))
    return best.entries, tried


def _finer(info: ModelInfo, best: Chosen, outlined: Sequence[Outline]) -> list[Outline]:
    """The best plan with more parameters and with fewer, where the search chose their number."""
    recipe = best.fitted.recipe
    shares = {o.recipe.budget.text for o in outlined if o.recipe.budget is not None}
    if recipe.budget is None or len(shares) < 2:
        return []
    found: list[Outline] = []
    for factor in FINER:
        wanted = Budget(str(round(factor * recipe.budget.resolve(parameters_of(info)))))
        with suppress(BudgetError, NothingToConvert):
            found.append(outline(info, dataclasses.replace(recipe, budget=wanted)))
    return [dataclasses.replace(one, rounded=outlined[0].rounded) for one in found]


def overhead(plan: Plan) -> int:
    """Bytes that a file takes beside the numbers of its tensors, about."""
    return OVERHEAD + EACH * len(plan.tensors)


def bits_of(plan: Plan, bytes_: int) -> float:
    """Bits that each stored number of a plan has on average, in a file of so many bytes."""
    numbers = sum(math.prod(shape) for shape in plan.tensors.values())
    return 8 * (bytes_ - overhead(plan)) / max(1, numbers)
