"""From a recipe and a model's names and shapes to an outline, and with its weights to a plan."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from tiedconv.core.assemble import assemble, member_expr
from tiedconv.core.expr import Expr
from tiedconv.core.plan import Block, Group, Member, Plan, Slot, stored_name
from tiedconv.errors import BudgetError, NothingToConvert, PlanError, RecipeError
from tiedconv.families.inspect import ModelInfo
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.coverage import coverage
from tiedconv.planning.rank_allocation import (
    KfacMetrics,
    allocate,
    allocate_evenly,
    using_all,
    with_least,
)
from tiedconv.planning.recipe import Budget, Recipe, Rule
from tiedconv.planning.scheme_search import Part, choose, least_size
from tiedconv.schemes import Draft, Scheme, all_schemes, make_scheme

OPEN_BUDGET = "50%"  # of a scheme that chooses by size, where no size is given
KEPT = "kept"  # the scheme's name of rows that share a tensor with converted ones


@dataclass(frozen=True)
class Task:
    """What one rule makes of a model: its scheme, the blocks it governs, the groups drafted."""

    scheme: Scheme
    blocks: tuple[Block, ...]
    drafts: tuple[Draft, ...]


@dataclass(frozen=True)
class Outline:
    """What a recipe makes of a model, from names and shapes alone.

    Args:
        recipe: that was asked for.
        tasks: one for each of its rules.
        budget: parameters that may be stored; None without a budget.
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

    @property
    def weights(self) -> dict[str, bool]:
        """The weights whose errors count, and whether each is stored as `(in, out)`."""
        slots = (s for task in self.tasks for block in task.blocks for s in block.slots.values())
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
    wanted = recipe.budget or (Budget(OPEN_BUDGET) if is_open else None)
    if wanted is None:
        return Outline(recipe, tasks, None, compile_plan(info, drafts))
    original = parameters_of(info)
    budget = wanted.resolve(original)
    least = with_least(drafts)
    stored = compile_plan(info, least).stored
    smallest = least_stored(info, tasks) if is_open else stored
    if smallest > budget:
        raise _too_small(recipe, wanted, info, tasks, smallest, budget, original)
    even = allocate_evenly(least, max(0, budget - stored))
    return Outline(recipe, tasks, budget, compile_plan(info, even))


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
    if outlined.budget is None:
        return outlined.plan
    parts = parts_of(outlined.tasks)
    least = with_least([d for task in outlined.tasks for d in task.drafts])
    is_open = any(len(part.candidates) > 1 for part in parts)
    if is_open:
        spare = outlined.budget - parameters_of(info) + parameters_in(parts)
    else:
        spare = outlined.budget - compile_plan(info, least).stored

    def chosen(spare: int) -> tuple[Plan, bool]:
        if is_open:
            drafts = choose(parts, spare, editor, metrics)
        else:
            drafts = allocate(least, spare, editor, metrics)
        shared = any(d.scheme.has_shared_sides and len(d.members) > 2 for d in drafts)
        return compile_plan(info, drafts), shared

    plan, shared = chosen(spare)
    if shared:
        plan = using_all(plan, spare, outlined.budget, lambda spare: chosen(spare)[0])
    if plan.stored > outlined.budget:
        raise PlanError(
            f"The plan stores {plan.stored:,} parameters, and {outlined.budget:,} were asked for",
            "Nothing was converted",
            "Report this as a bug, with the model and the recipe",
            code="budget-exceeded",
        )
    return plan


def draft(info: ModelInfo, recipe: Recipe) -> list[Task]:
    """Which groups each rule of the recipe makes; the first rule that takes a tensor has it.

    Raises:
        NothingToConvert: there is no group.
    """
    tasks = _tasks(info, recipe)
    if not any(task.drafts for task in tasks):
        raise _nothing(info, recipe)
    return tasks


def _tasks(info: ModelInfo, recipe: Recipe) -> list[Task]:
    blocks = [block for _, block in info.blocks]
    taken: set[str] = set()
    tasks: list[Task] = []
    for rule in recipe.rules:
        scheme = make_scheme(rule.scheme, rule.options)
        mine = _governed(rule, blocks, taken)
        drafts = tuple(scheme.drafts(mine))
        taken |= {m.slot.tensor for d in drafts for m in d.members}
        tasks.append(Task(scheme, tuple(mine), drafts))
    return tasks


def compile_plan(info: ModelInfo, drafts: Sequence[Draft]) -> Plan:
    """The plan of settled groups."""
    pieces: dict[str, list[tuple[Slot, Expr]]] = defaultdict(list)
    groups: list[Group] = []
    for d in drafts:
        layout = d.scheme.layout(d.shapes)
        groups.append(
            Group(d.name, d.scheme.name, d.scheme.to_json(), d.members, dict(layout.factors))
        )

        def rename(factor: str, name: str = d.name) -> str:
            return stored_name(name, factor)

        for member, expr in zip(d.members, layout.weights, strict=True):
            pieces[member.slot.tensor].append(
                (member.slot, member_expr(member, expr.rename(rename)))
            )
    if len({g.name for g in groups}) < len(groups):
        raise RecipeError(
            "Two groups of the plan have one name",
            hint="Report this as a bug",
            code="group-name-twice",
        )
    weights: dict[str, Expr] = {}
    for tensor, parts in pieces.items():
        weights[tensor], rest = assemble(parts)
        for slot in rest.values():
            factors = {f"rows{slot.start}-{slot.stop}": slot.matrix_shape}
            groups.append(Group(tensor, KEPT, {}, (Member(slot),), factors))
    kept = {n: s for n, s in info.shapes.items() if n not in weights}
    # In the order of a file, so that what is read back trains to the bit as what was written.
    weights, kept = dict(sorted(weights.items())), dict(sorted(kept.items()))
    aliases = dict(sorted(info.aliases.items()))
    plan = Plan(weights, tuple(groups), kept, info.buffers, aliases)
    plan.validate()
    return plan


def chooses_by_size(recipe: Recipe) -> bool:
    """Whether a budget decides what is stored: one that is given, or that of an open scheme."""
    schemes = (make_scheme(rule.scheme, rule.options) for rule in recipe.rules)
    return recipe.budget is not None or any(len(s.candidates()) > 1 for s in schemes)


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
            budget = recipe.budget or Budget(OPEN_BUDGET)
            found.append(dataclasses.replace(recipe, rules=rules, budget=budget))
    return found


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


def _governed(rule: Rule, blocks: Sequence[Block], taken: set[str]) -> list[Block]:
    public = {s.tensor for b in blocks if not b.opt_in for s in b.slots.values()}
    narrow = rule.without_patterns_matching(public)  # what is private has to be meant
    mine: list[Block] = []
    for block in blocks:
        mean = narrow if block.opt_in else rule
        names = {s.tensor for s in block.slots.values()}
        part = block.keep({n for n in names if mean.takes(n) and n not in taken})
        if part.slots:
            mine.append(part)
    return mine


def parts_of(tasks: Sequence[Task]) -> list[Part]:
    """What each task may choose from, for which blocks."""
    return [Part(task.scheme.candidates(), task.blocks) for task in tasks]


def parameters_in(parts: Sequence[Part]) -> int:
    """Parameters of the original's matrices in these parts."""
    return sum(s.numel for part in parts for b in part.blocks for s in b.slots.values())


def parameters_of(info: ModelInfo) -> int:
    """Parameters of the original."""
    return sum(math.prod(s) for s in info.parameters.values())


def least_stored(info: ModelInfo, tasks: Sequence[Task]) -> int:
    """The fewest parameters that the tasks can store, of the whole model."""
    parts = parts_of(tasks)
    return parameters_of(info) - parameters_in(parts) + sum(map(least_size, parts))


def _too_small(
    recipe: Recipe, wanted: Budget, info: ModelInfo, tasks: Sequence[Task], smallest: int,
    budget: int, original: int,
) -> BudgetError:  # fmt: skip
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


def _share(count: int, original: int) -> str:
    return f"{count:,} ({100 * count / original:.1f} %)"


def _nothing(info: ModelInfo, recipe: Recipe) -> NothingToConvert:
    schemes = all_schemes()
    wanted = "; ".join(f"{r.scheme}: {schemes[r.scheme].pattern}" for r in recipe.rules)
    ask = " (if --include names it alone)"
    saw = sorted({f"{f} {block.kind}{ask if block.opt_in else ''}" for f, block in info.blocks})
    if not saw:
        return NothingToConvert(
            "Nothing in this model can be converted: no linear layer or convolution has 8 inputs "
            "and outputs or more",
            f"Its {len(info.parameters)} parameters would all be kept as they are",
            "If its matrices are not named `weight`, write a family for it (docs/extending.md)",
            code="nothing-to-convert",
        )
    takes = [(scheme, _converted_by(info, scheme)) for scheme in schemes]
    ways = [f"--scheme {name} (converts {100 * share:.0f} %)" for name, share in takes if share]
    ways += ["a wider --include"] * any(rule.include or rule.exclude for rule in recipe.rules)
    return NothingToConvert(
        f"Nothing in this model can be converted by this recipe ({wanted})",
        f"What the model has: {', '.join(saw)}",
        f"Try {' or '.join(ways)}",
        code="nothing-to-convert",
    )


def _converted_by(info: ModelInfo, scheme: str) -> float:
    """The fraction of the parameters that a scheme converts by its defaults, 0 if none."""
    try:
        drafts = [d for task in _tasks(info, Recipe.of(scheme)) for d in task.drafts]
    except NothingToConvert:  # it needs an option that only the user knows
        return 0.0
    return coverage(info, [m.slot for d in drafts for m in d.members]).share
