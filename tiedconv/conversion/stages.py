"""Align, measure, arrange, fit: the stages that one recipe goes through, each run once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tiedconv.calibration import KfacStatistics
from tiedconv.conversion.fit import Fit, OnGroup, fit_factors
from tiedconv.conversion.refused_symmetries import cost_of_refused
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.tensor_store import TensorStore, Workspace
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.planner import (
    Outline,
    align_weights,
    arrange_weights,
    choose_ranks,
)


def align(outlined: Outline, store: TensorStore) -> Workspace:
    """A workspace whose weights are aligned for a recipe's schemes."""
    workspace = store.open()
    try:
        align_weights(outlined.tasks, workspace.editor)
    except BaseException:
        workspace.close()
        raise
    return workspace


def measure(
    outlined: Outline, workspace: Workspace, cache: StatisticsCache | None
) -> KfacStatistics | None:
    """Statistics of the weights that a recipe governs, as aligned; None without images."""
    return None if cache is None else cache.of(outlined.weights, workspace)


def arrange(
    outlined: Outline, workspace: Workspace, statistics: KfacStatistics | None
) -> KfacStatistics | None:
    """The statistics of the weights after symmetries that schemes choose by them."""
    metrics = {} if statistics is None else statistics.metrics
    metrics = arrange_weights(outlined.tasks, workspace.editor, metrics)
    return None if statistics is None else dataclasses.replace(statistics, metrics=metrics)


def fit(
    info: ModelInfo,
    outlined: Outline,
    workspace: Workspace,
    statistics: KfacStatistics | None,
    on_group: OnGroup | None = None,
    limit: float = math.inf,
) -> Fit:
    """The ranks that fit the weights best at the budget, and the factors.

    Raises:
        PlanError: more would be stored than was asked for (`budget-exceeded`).
        TooCostly: the errors cost as much as `limit`.
    """
    metrics = {} if statistics is None else statistics.metrics
    plan = choose_ranks(info, outlined, workspace.editor, metrics)
    plan, cost = fit_factors(plan, workspace, metrics, on_group, limit)
    ridge = None if statistics is None else statistics.ridge
    found: dict[str, Any] = {**workspace.editor.symmetries}
    if found["refused"]:
        found["cost"] = cost_of_refused(outlined, plan, workspace)
    tensors = workspace.fitted(plan)
    return Fit(outlined.recipe, plan, cost, ridge, tensors, found, workspace.close)


@torch.no_grad()
def carry_out(
    info: ModelInfo,
    outlined: Outline,
    store: TensorStore,
    cache: StatisticsCache | None = None,
    on_group: OnGroup | None = None,
    limit: float = math.inf,
) -> tuple[Fit, KfacStatistics | None]:
    """All four stages, for one recipe: the fit, and the statistics that it was made by.

    Args:
        info: of the model.
        outlined: the recipe on it.
        store: the weights.
        cache: measures statistics on images, if there are any.
        on_group: called with (groups fitted, groups in all).
        limit: of the cost.

    Raises:
        TooCostly: the errors cost as much as `limit`.
    """
    workspace = align(outlined, store)
    try:
        statistics = arrange(outlined, workspace, measure(outlined, workspace, cache))
        return fit(info, outlined, workspace, statistics, on_group, limit), statistics
    except BaseException:
        workspace.close()
        raise
