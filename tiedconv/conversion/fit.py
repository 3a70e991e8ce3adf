"""From a plan and aligned weights to the factors that are stored."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tiedconv.conversion.tensor_store import Workspace
from tiedconv.core.plan import Group, Plan
from tiedconv.numerics.least_squares import improve, total_cost
from tiedconv.planning.drafting import KEPT
from tiedconv.planning.rank_allocation import KfacMetrics, metrics_of
from tiedconv.planning.recipe import Recipe
from tiedconv.schemes import make_scheme

OnGroup = Callable[[int, int], None]
"""Called with (groups fitted, groups in all)."""


@dataclass(frozen=True)
class Fit:
    """A recipe carried out on a model's weights.

    Args:
        recipe: that was carried out.
        plan: with the relative error of each group.
        cost: of all errors together, Fisher-weighted if statistics were measured.
        ridge: the median ridge of the statistics, None if none were measured.
        tensors: the kept tensors under their names, the factors under their stored names.
        symmetries: those that were `used` to align the weights and those `refused`, see
            `WeightEditor.symmetries`, and what refusing them did to the fit, `cost`, see
            `conversion.refused_symmetries`.
        close: frees what `tensors` are read from, where they are on disk.
    """

    recipe: Recipe
    plan: Plan
    cost: float
    ridge: float | None
    tensors: Mapping[str, Tensor]
    symmetries: Mapping[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors alone, under their stored names."""
        return {name: self.tensors[name] for name in self.plan.factors}


class TooCostly(Exception):
    """A fit was given up, as it can't be the best any more."""


def fit_factors(
    plan: Plan,
    workspace: Workspace,
    metrics: KfacMetrics | None = None,
    on_group: OnGroup | None = None,
    limit: float = math.inf,
) -> tuple[Plan, float]:
    """Fit every group of a plan, its factors kept in the workspace.

    Args:
        plan: from `planning.planner.choose_ranks`.
        workspace: holds the aligned weights.
        metrics: Fisher-weighted errors; the fit minimises them.
        on_group: called with (groups fitted, groups in all).
        limit: of the cost of all errors together; as costs only add up, the fit ends above it.

    Returns:
        the plan with the relative error of each group, and the cost of all errors together.

    Raises:
        TooCostly: the limit was reached.
    """
    groups: list[Group] = []
    cost = 0.0
    for i, group in enumerate(plan.groups):
        done, factors, wrong = fit_group(group, workspace.matrices(group.members), metrics)
        groups.append(done)
        cost += wrong
        if cost >= limit:
            raise TooCostly
        dtype = workspace.dtypes[group.members[0].slot.tensor]
        for name in list(factors):  # each is freed once kept: the next group needs the memory
            workspace.keep(group.stored_name(name), factors.pop(name).to(dtype))
        if on_group is not None:
            on_group(i + 1, len(plan.groups))
    return dataclasses.replace(plan, groups=tuple(groups)), cost


def fit_group(
    group: Group, matrices: Sequence[Tensor], metrics: KfacMetrics | None = None
) -> tuple[Group, dict[str, Tensor], float]:
    """The factors of one group.

    Args:
        group: of a plan.
        matrices: of its members, in working precision.
        metrics: Fisher-weighted errors.

    Returns:
        the group with the relative error of its fit; local factor name to tensor, in the
        precision of the matrices; and the cost of its errors.
    """
    if group.scheme == KEPT:
        fitted, wrong, total = {next(iter(group.factors)): matrices[0]}, 0.0, 0.0
    else:
        scheme = make_scheme(group.scheme, group.options)
        shapes = [m.shape for m in group.members]
        measures = scheme.measures(shapes, metrics_of(group.members, metrics or {}))
        fitted = scheme.fit_measured(matrices, measures)
        weights = scheme.layout(shapes).weights
        # Without images only a product that several matrices share is not optimal yet.
        if scheme.base_shape(shapes) is not None or any(m.measured for m in measures):
            fitted = improve(weights, fitted, matrices, measures)
        wrong = max(0.0, total_cost(weights, fitted, matrices, measures))
        total = sum(m.cost(w) for w, m in zip(matrices, measures, strict=True))
    error = math.sqrt(wrong / total) if total > 0 else 0.0
    return dataclasses.replace(group, error=error), fitted, wrong
