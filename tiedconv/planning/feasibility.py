"""What recipes can reach at least, and the errors that say so where a budget is too small."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from tiedconv.core.plan import Plan
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError, NothingToConvert, PlanError
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.budget import Budget
from tiedconv.planning.coverage import coverage
from tiedconv.planning.drafting import (
    Task,
    compile_plan,
    draft,
    parameters_of,
    parts_of,
)
from tiedconv.planning.recipe import Recipe
from tiedconv.planning.resources import Resources, of_blocks, total
from tiedconv.planning.scheme_search import Part, least_of
from tiedconv.runtime.macs import work_of
from tiedconv.schemes import all_schemes


def workload_of(info: ModelInfo, recipe: Recipe) -> Workload | None:
    """The workload in the unit of what a recipe limits; None if it limits none.

    Raises:
        BudgetError: the model could not be run on any input, so nothing was counted.
    """
    if recipe.latency is not None:
        if info.times is None:
            raise BudgetError(
                "No times were measured for this model",
                f"latency={recipe.latency.text!r} means nothing without them",
                "Ask for macs instead; a plan without a conversion measures nothing",
                code="latency-unknown",
            )
        return info.times
    if recipe.macs is None:
        return None
    if info.workload is None:
        raise BudgetError(
            "The multiply-adds of this model can't be counted: it runs on no input that was tried",
            f"macs={recipe.macs.text!r} means nothing without them",
            "Give an example of its input (in Python: example=...), or ask for --params instead",
            code="macs-unknown",
        )
    return info.workload


def least_stored(info: ModelInfo, tasks: Sequence[Task]) -> int:
    """The fewest parameters that the tasks can store, of the whole model."""
    parts = parts_of(tasks)
    return int(total([of_rest(info, parts), *map(least_of, parts)]).params)


def least_work(info: ModelInfo, tasks: Sequence[Task], work: Workload) -> int:
    """The least work that the tasks can take, of the whole model, in the unit of its workload."""
    parts = parts_of(tasks)
    least = (least_of(part, work) for part in parts)
    return math.ceil(total([of_rest(info, parts, work), *least]).work)


def of_rest(info: ModelInfo, parts: Sequence[Part], work: Workload | None = None) -> Resources:
    """What all that lies in none of the parts takes, which no scheme changes."""
    whole = Resources(parameters_of(info), 0 if work is None else work.total)
    return whole - of_blocks((block for part in parts for block in part.blocks), work)


def smaller_options(info: ModelInfo, recipe: Recipe) -> list[tuple[str, int]]:
    """Other options and schemes that store less: how to ask for each, and its parameters."""
    ways: dict[tuple[str, int], str] = {}
    current = _size(info, recipe)
    for scheme, cls in all_schemes().items():
        for options in cls.smaller_options:
            base = {} if scheme != recipe.rules[0].scheme else dict(recipe.rules[0].options)
            rule = dataclasses.replace(
                recipe.rules[0], scheme=scheme, options={**base, **options}
            )  # fmt: skip
            flags = " ".join(f"--option {k}={_plain(v)}" for k, v in options.items())
            how, size = f"--scheme {scheme} {flags}".strip(), _size(info, Recipe((rule,)))
            # An option that changes nothing here is no way of its own: the shortest of those alike.
            alike = ways.get((scheme, size))
            if size and (not current or size < current) and (not alike or len(how) < len(alike)):
                ways[scheme, size] = how
    return sorted(((how, size) for (_, size), how in ways.items()), key=lambda way: -way[1])


def _size(info: ModelInfo, recipe: Recipe) -> int:
    """Parameters stored without a budget, 0 if the recipe converts nothing."""
    try:
        drafts = [d for task in draft(info, recipe) for d in task.drafts]
    except NothingToConvert:
        return 0
    return compile_plan(info, drafts).stored


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def require_within(
    plan: Plan, recipe: Recipe, budget: int | None, limit: int | None, info: ModelInfo
) -> None:
    """What every plan that was chosen for a budget holds.

    Args:
        plan: that was chosen.
        recipe: that was asked for.
        budget: parameters that may be stored, None for as many as there are.
        limit: work of a forward pass, likewise.
        info: of the model.

    Raises:
        PlanError: it takes more than was asked for (`budget-exceeded`), which is a bug.
        BudgetError: no plan was found that meets both budgets (`budgets-exceeded`).
    """
    found = [(plan.stored, budget, Budget("100%"))]
    work = workload_of(info, recipe)
    if work is not None and recipe.work is not None:
        found.append((work_of(plan.weights, work), limit, recipe.work))
    for taken, most, wanted in found:
        if most is None or taken <= most:
            continue
        if budget is not None and limit is not None:
            raise BudgetError(
                f"No plan was found that meets both budgets: the best takes "
                f"{wanted.shown(taken)}, and {wanted.shown(most)} were asked for",
                "Nothing was converted",
                "Ask for more of either",
                code="budgets-exceeded",
                smallest=plan.stored,
            )
        raise PlanError(
            f"The plan takes {wanted.shown(taken)}, and {wanted.shown(most)} were asked for",
            "Nothing was converted",
            "Report this as a bug, with the model and the recipe",
            code="budget-exceeded",
        )


def too_small(
    recipe: Recipe, wanted: Budget, info: ModelInfo, tasks: Sequence[Task], smallest: int,
    budget: int, original: int,
) -> BudgetError:  # fmt: skip
    """The error for a budget of parameters below the smallest that a recipe reaches."""
    converted = [m.slot for task in tasks for d in task.drafts for m in d.members]
    found = coverage(info, converted)
    kept = "" if found.share > 0.98 else (
        f". {100 * (1 - found.share):.0f} % of the parameters are kept as they are, the largest: "
        f"{found.largest()}"
    )  # fmt: skip
    ways = [w for w in smaller_options(info, Recipe(recipe.rules)) if w[1] <= budget]
    asked_for = tuple(f"--scheme {rule.scheme} " for rule in recipe.rules)
    ways.sort(key=lambda way: not f"{way[0]} ".startswith(asked_for))
    what = "; ".join(f"{flags} reaches {_share(size, original)}" for flags, size in ways[:4])
    return BudgetError(
        f"{wanted.text} is {budget:,} parameters, but this recipe stores at least "
        f"{_share(smallest, original)}{kept}",
        "Nothing was written",
        f"Ask for that or more{', or choose another way: ' + what if what else ''}",
        code="budget-too-small",
        smallest=smallest,
    )


def too_little_work(
    recipe: Recipe, wanted: Budget, info: ModelInfo, work: Workload, fewest: int, budget: int
) -> BudgetError:
    """The error for a budget of work below the least that a recipe reaches."""
    whole = work.total
    reached: list[tuple[int, str]] = []
    for scheme in all_schemes():
        try:
            tasks = draft(info, Recipe.of(scheme))
        except NothingToConvert:
            continue
        if (least := least_work(info, tasks, work)) < whole:
            reached.append((least, scheme))

    def share(count: int) -> str:
        return f"{wanted.shown(count)} ({100 * count / whole:.1f} %)"

    ways = "; ".join(f"--scheme {s} reaches {share(n)}" for n, s in sorted(reached))
    asked = ", ".join(dict.fromkeys(rule.scheme for rule in recipe.rules))
    never = "" if fewest < whole else (
        f". Weights of scheme {asked} have their own shape when they are used"
    )  # fmt: skip
    return BudgetError(
        f"{wanted.of}={wanted.text!r} is {wanted.shown(budget)}, but this recipe takes at least "
        f"{share(fewest)}{never}",
        "Nothing was written",
        f"Ask for that or more, or choose another scheme: {ways or 'none takes fewer here'}",
        code="macs-too-few" if wanted.of == "macs" else "latency-too-low",
        smallest=fewest,
    )


def _share(count: int, original: int) -> str:
    return f"{count:,} ({100 * count / original:.1f} %)"
