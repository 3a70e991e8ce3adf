"""Plans and fits of weights in memory, as the pipeline makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from tiedconv.conversion.fit import OnGroup, fit_factors
from tiedconv.conversion.tensor_store import MemoryStore, Workspace
from tiedconv.core.plan import Plan
from tiedconv.families.inspect import ModelInfo
from tiedconv.numerics.symmetries import Allows
from tiedconv.planning.planner import align_weights, arrange_weights, choose_ranks, outline
from tiedconv.planning.rank_allocation import KfacMetrics
from tiedconv.planning.recipe import Recipe


def make_plan(
    info: ModelInfo,
    recipe: Recipe,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    in_place: bool = False,
    allows: Allows | None = None,
    measure: Callable[[Mapping[str, Tensor]], KfacMetrics] | None = None,
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of a recipe, and the aligned weights; without weights, its outline's plan."""
    outlined = outline(info, recipe)
    if tensors is None:
        return outlined.plan, {}
    workspace = MemoryStore(tensors, in_place=in_place, allows=allows).open()
    align_weights(outlined.tasks, workspace.editor)
    aligned = {name: workspace.aligned(name) for name in tensors}
    metrics = {} if measure is None else measure(aligned)
    metrics = arrange_weights(outlined.tasks, workspace.editor, metrics)
    aligned = {name: workspace.aligned(name) for name in tensors}
    return choose_ranks(info, outlined, workspace.editor, metrics), aligned


def fit_plan(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    on_group: OnGroup | None = None,
    metrics: KfacMetrics | None = None,
) -> tuple[Plan, dict[str, Tensor], float]:
    """The plan with its errors, the factors, and the cost, of weights that are aligned already."""
    workspace: Workspace = MemoryStore(tensors).open()
    plan, cost = fit_factors(plan, workspace, metrics, on_group)
    found = workspace.fitted(plan)
    return plan, {name: found[name] for name in plan.factors}, cost


def weights_of(info: ModelInfo, recipe: Recipe) -> dict[str, bool]:
    """The weights that a recipe governs, and whether each is stored as `(in, out)`."""
    return outline(info, recipe).weights
