"""From a recipe and a model's names and shapes to an outline, and with its weights to a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from tiedconv.core.plan import Plan
from tiedconv.core.units import matrices_of
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.families.inspect import ModelInfo
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.budget import Budget
from tiedconv.planning.drafting import Task, compile_plan, draft, parameters_of, parts_of
from tiedconv.planning.feasibility import (
    least_stored,
    least_work,
    of_rest,
    require_within,
    too_little_work,
    too_small,
    workload_of,
)
from tiedconv.planning.rank_allocation import (
    KfacMetrics,
    allocate,
    allocate_evenly,
    using_all,
    with_least,
)
from tiedconv.planning.recipe import Recipe
from tiedconv.planning.resources import Resources, limits
from tiedconv.planning.scheme_search import choose
from tiedconv.runtime.macs import work_of
from tiedconv.schemes import make_scheme

OPEN_BUDGET = "50%"  # of a scheme that chooses by size, where no size is given
TRIES = 8  # to meet a limit of time


@dataclass(frozen=True)
class Outline:
    """What a recipe makes of a model, from names and shapes alone.

    Args:
        recipe: that was asked for.
        tasks: one for each of its rules.
        budget: parameters that may be stored; None without a budget.
        work: that a forward pass may take, in the unit of the budget; None without one.
        plan: with each rank the same fraction of its matrix. `choose_ranks` replaces it by the plan
            for the weights.
        rounded: weights whose errors are measured because they are rounded, whether or not a rule
            governs them, and whether each is stored as `(in, out)`.
    """

    recipe: Recipe
    tasks: tuple[Task, ...]
    budget: int | None
    plan: Plan
    rounded: Mapping[str, bool] = field(default_factory=dict)
    work: int | None = None

    @property
    def weights(self) -> dict[str, bool]:
        """The weights whose errors count, and whether each is stored as `(in, out)`."""
        slots = (
            s for task in self.tasks for block in task.blocks for s in matrices_of(block).values()
        )
        return {**self.rounded, **{slot.tensor: slot.transposed for slot in slots}}

    @property
    def aligns(self) -> bool:
        """Whether its schemes align the weights at all."""
        return any(task.scheme.aligns for task in self.tasks)

    @property
    def alignment(self) -> Hashable:
        """Equal for outlines whose schemes align the weights in the same way."""
        return tuple((t.scheme.alignment, tuple(b.name for b in t.blocks)) for t in self.tasks)


def outline(info: ModelInfo, recipe: Recipe) -> Outline:
    """What a recipe makes of a model; whatever can't be done is refused here, without weights.

    Raises:
        NothingToConvert: no tensor matches; the message lists what was looked for.
        BudgetError: the budget can't be met; the message names the smallest size that can.
    """
    tasks = tuple(draft(info, recipe))
    drafts = [d for task in tasks for d in task.drafts]
    parts = parts_of(tasks)
    is_open = any(len(part.candidates) > 1 for part in parts)
    wanted = recipe.budget
    if wanted is None and recipe.work is None:
        wanted = Budget(OPEN_BUDGET) if is_open else None
    if wanted is None and recipe.work is None:
        return Outline(recipe, tasks, None, compile_plan(info, drafts))
    original, work = parameters_of(info), workload_of(info, recipe)
    budget = None if wanted is None else wanted.resolve(original)
    most = None if recipe.work is None or work is None else recipe.work.resolve(work.total)
    least = with_least(drafts)
    plan = compile_plan(info, least)
    limit = limits(budget, most)
    smallest = least_stored(info, tasks) if is_open else plan.stored
    if wanted is not None and budget is not None and smallest > budget:
        raise too_small(recipe, wanted, info, tasks, smallest, budget, original)
    if recipe.work is not None and work is not None and most is not None:
        fewest = least_work(info, tasks, work)
        if fewest > most:
            raise too_little_work(recipe, recipe.work, info, work, fewest, most)
    spare = limit - Resources(plan.stored, 0 if work is None else work_of(plan.weights, work))
    spare = Resources(max(0, spare.params), max(0, spare.work))
    even = allocate_evenly(least, spare, work)
    return Outline(recipe, tasks, budget, compile_plan(info, even), work=most)


def outlines(info: ModelInfo, recipe: Recipe) -> tuple[Outline, ...]:
    """The outlines of a recipe and of its alternatives, those that can be carried out.

    Raises:
        NothingToConvert, BudgetError: none can; of budgets, the error with the smallest size.
    """
    found: list[Outline] = []
    refused: list[BudgetError] = []
    for wanted in alternatives(recipe):
        try:
            found.append(outline(info, wanted))
        except BudgetError as error:
            refused.append(error)
        except NothingToConvert:
            if wanted is recipe:
                raise
    if not found:
        raise min(refused, key=lambda error: error.smallest)
    return tuple(found)


def align_weights(tasks: Sequence[Task], editor: WeightEditor) -> None:
    """Apply the function-preserving symmetries with which the schemes fit better, in the editor."""
    for task in tasks:
        task.scheme.align(task.blocks, editor)


def arrange_weights(
    tasks: Sequence[Task], editor: WeightEditor, metrics: KfacMetrics
) -> KfacMetrics:
    """Apply the symmetries that schemes choose by what errors cost; returns the metrics then."""
    for task in tasks:
        metrics = task.scheme.arrange(task.blocks, editor, metrics)
    return metrics


def choose_ranks(
    info: ModelInfo, outlined: Outline, editor: WeightEditor, metrics: KfacMetrics
) -> Plan:
    """The plan whose schemes and ranks leave the least error at the budget, if there is one.

    Args:
        info: of the model.
        outlined: the recipe on it.
        editor: the weights, aligned.
        metrics: Fisher-weighted error of each weight; without any, all weights count alike.

    Raises:
        PlanError: more would be stored than was asked for (`budget-exceeded`), which is a bug.
    """
    if outlined.budget is None and outlined.work is None:
        return outlined.plan
    parts = parts_of(outlined.tasks)
    least = with_least([d for task in outlined.tasks for d in task.drafts])
    is_open = any(len(part.candidates) > 1 for part in parts)
    work = None if outlined.work is None else workload_of(info, outlined.recipe)
    spare = limits(outlined.budget, outlined.work)
    if is_open:
        spare -= of_rest(info, parts, work)
    else:
        taken = compile_plan(info, least)
        spare -= Resources(taken.stored, 0 if work is None else work_of(taken.weights, work))

    def chosen(spare: Resources) -> tuple[Plan, bool]:
        if is_open:
            drafts = choose(parts, spare, editor, metrics, work)
        else:
            drafts = allocate(least, spare, editor, metrics, work)
        shared = any(d.scheme.has_shared_sides and len(d.members) > 2 for d in drafts)
        return compile_plan(info, drafts), shared

    plan, shared = chosen(spare)
    if work is not None and outlined.work is not None:
        plan = _in_time(plan, spare, outlined.work, work, lambda spare: chosen(spare)[0])
    if shared and outlined.budget is not None and work is None:
        plan = using_all(plan, spare, outlined.budget, lambda spare: chosen(spare)[0])
    require_within(plan, outlined.recipe, outlined.budget, outlined.work, info)
    return plan


def _in_time(
    plan: Plan, spare: Resources, most: int, work: Workload, chosen: Callable[[Resources], Plan]
) -> Plan:
    """The plan, chosen again for as much less work as it takes too much.

    Ranks pay along a line, and what a runtime takes lies beside it: a weight itself may run where
    its factors gain nothing.
    """
    for _ in range(TRIES):
        over = work_of(plan.weights, work) - most
        if over <= 0:
            break
        spare -= Resources(0, over)
        plan = chosen(spare)
    return plan


def chooses_by_size(recipe: Recipe) -> bool:
    """Whether a budget decides what is stored: one that is given, or that of an open scheme."""
    schemes = (make_scheme(rule.scheme, rule.options) for rule in recipe.rules)
    given = recipe.budget is not None or recipe.work is not None
    return given or any(len(s.candidates()) > 1 for s in schemes)


def alternatives(recipe: Recipe) -> list[Recipe]:
    """A recipe, and what else its schemes want tried at its budget; none without a budget."""
    found = [recipe]
    if not chooses_by_size(recipe):
        return found
    schemes = [make_scheme(rule.scheme, rule.options) for rule in recipe.rules]
    for i, rule in enumerate(recipe.rules):
        for other in schemes[i].alternatives():
            usual = type(other)().to_json()
            options = {k: v for k, v in other.to_json().items() if v != usual[k]}
            changed = dataclasses.replace(rule, scheme=other.name, options=options)
            rules = (*recipe.rules[:i], changed, *recipe.rules[i + 1 :])
            budget = recipe.budget
            if budget is None and recipe.work is None:
                budget = Budget(OPEN_BUDGET)
            found.append(dataclasses.replace(recipe, rules=rules, budget=budget))
    return found
