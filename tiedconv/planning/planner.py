"""From a recipe and a model's info to a plan, and from weights to a plan's factors."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.core.assemble import assemble, member_expr
from tiedconv.core.expr import Expr
from tiedconv.core.plan import Block, Group, Member, Plan, Slot, stored_name
from tiedconv.errors import BudgetError, NothingToConvert, RecipeError
from tiedconv.families import all_families
from tiedconv.families.inspect import ModelInfo
from tiedconv.numerics.least_squares import improve, total_cost
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.rank_allocation import (
    KfacMetrics,
    allocate,
    allocate_evenly,
    metrics_of,
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


def make_plan(
    info: ModelInfo,
    recipe: Recipe,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    in_place: bool = False,
    measure: Callable[[Mapping[str, Tensor]], KfacMetrics] | None = None,
) -> tuple[Plan, dict[str, Tensor]]:
    """The plan for a model, and its weights moved to where the schemes fit best.

    Args:
        info: of the model.
        recipe: what is wanted.
        tensors: the weights; without them nothing is moved and a budget is spread evenly.
        in_place: move the given tensors themselves, which saves their size in memory.
        measure: from the moved weights, what errors cost; without it all count alike.

    Raises:
        NothingToConvert: no tensor matches; the message lists what was looked for.
        BudgetError: the budget can't be met; the message names the smallest size that can.
    """
    tasks, plan = _outline(info, recipe)
    if tensors is None:
        return plan, {}
    editor = _aligned(tasks, _editor(tensors, in_place=in_place))
    moved = {
        n: t if editor.tensors[n] is t else editor.tensors[n].to(t.dtype)
        for n, t in tensors.items()
    }
    metrics = measure(moved) if measure is not None else {}
    return compile_plan(info, _within(recipe, info, tasks, editor, metrics)), moved


def plan_on(info: ModelInfo, recipe: Recipe, editor: WeightEditor) -> Plan:
    """The plan for weights on a workbench, moved there to where the schemes fit best.

    Args:
        info: of the model.
        recipe: what is wanted.
        editor: the weights, each as `widened` gives it.

    Raises:
        NothingToConvert, BudgetError: as `make_plan`, before any weight is moved.
    """
    tasks, _ = _outline(info, recipe)
    return compile_plan(info, _within(recipe, info, tasks, _aligned(tasks, editor), {}))


def align(
    info: ModelInfo, recipe: Recipe, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:  # fmt: skip
    """The weights where a recipe's schemes fit best: the same function in other numbers."""
    editor = _aligned(draft(info, recipe), _editor(tensors, in_place=False))
    return {n: editor.tensors[n].to(t.dtype) for n, t in tensors.items()}


def _outline(info: ModelInfo, recipe: Recipe) -> tuple[list[Task], Plan]:
    """The tasks of a recipe, and its plan without weights: what can't be is refused here."""
    tasks = draft(info, recipe)
    return tasks, compile_plan(info, _within(recipe, info, tasks, None, {}))


def _editor(tensors: Mapping[str, Tensor], *, in_place: bool) -> WeightEditor:
    return WeightEditor({n: widened(t) for n, t in tensors.items()}, in_place=in_place)


def _aligned(tasks: Sequence[Task], editor: WeightEditor) -> WeightEditor:
    for task in tasks:
        task.scheme.align(task.blocks, editor)
    return editor


def draft(info: ModelInfo, recipe: Recipe) -> list[Task]:
    """Which groups each rule of the recipe makes; the first rule that takes a tensor has it."""
    found = info.blocks
    blocks = [block for _, block in found]
    taken: set[str] = set()
    tasks: list[Task] = []
    for rule in recipe.rules:
        scheme = make_scheme(rule.scheme, rule.options)
        mine = _governed(rule, blocks, taken)
        drafts = tuple(scheme.drafts(mine))
        taken |= {m.slot.tensor for d in drafts for m in d.members}
        tasks.append(Task(scheme, tuple(mine), drafts))
    if not any(task.drafts for task in tasks):
        raise _nothing(recipe, found)
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
        raise RecipeError("Two groups of the plan have one name", hint="Report this as a bug")
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


def fit_plan(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    on_group: Callable[[int, int], None] | None = None,
    metrics: KfacMetrics | None = None,
) -> tuple[Plan, dict[str, Tensor], float]:
    """The factors of every group, and the plan with the relative error of each fit.

    Args:
        plan: from `make_plan`.
        tensors: the weights that `make_plan` returned.
        on_group: called with (groups done, groups in all).
        metrics: what errors cost; the fit is improved in this metric and its error told in it.

    Returns:
        the plan; stored factor name to tensor, in the dtype of the weights they stand for; and
        the cost of all errors together.
    """
    factors: dict[str, Tensor] = {}
    groups: list[Group] = []
    cost = 0.0
    for i, group in enumerate(plan.groups):
        dtype = tensors[group.members[0].slot.tensor].dtype
        matrices = [working(m.matrix_of(tensors[m.slot.tensor])) for m in group.members]
        done, fitted, wrong = fit_group(group, matrices, metrics)
        cost += wrong
        groups.append(done)
        for name, value in fitted.items():
            # A factor has memory of its own: it is neither a weight itself nor part of one.
            own = value.to(dtype).clone(memory_format=torch.contiguous_format)
            factors[group.stored_name(name)] = own
        if on_group is not None:
            on_group(i + 1, len(plan.groups))
    return dataclasses.replace(plan, groups=tuple(groups)), factors, cost


def fit_group(
    group: Group, matrices: Sequence[Tensor], metrics: KfacMetrics | None = None
) -> tuple[Group, dict[str, Tensor], float]:
    """The factors of one group.

    Args:
        group: of a plan.
        matrices: of its members, each as `working` gives it.
        metrics: what errors cost.

    Returns:
        the group with the relative error of its fit; local factor name to tensor, in the
        precision of the matrices; and the cost of its errors.
    """
    if group.scheme == KEPT:
        fitted, wrong, total = {next(iter(group.factors)): matrices[0]}, 0.0, 0.0
    else:
        scheme = make_scheme(group.scheme, group.options)
        measures = metrics_of(group.members, metrics or {})
        fitted = scheme.fit(matrices)
        shapes = [m.shape for m in group.members]
        weights = scheme.layout(shapes).weights
        # Without images only a product that several matrices share is not at its best yet.
        if scheme.base_shape(shapes) is not None or any(m.measured for m in measures):
            fitted = improve(weights, fitted, matrices, measures)
        wrong = max(0.0, total_cost(weights, fitted, matrices, measures))
        total = sum(m.cost(w) for w, m in zip(matrices, measures, strict=True))
    error = math.sqrt(wrong / total) if total > 0 else 0.0
    return dataclasses.replace(group, error=error), fitted, wrong


def first_plan(info: ModelInfo, recipe: Recipe) -> Plan:
    """The plan of a recipe without weights: where there are alternatives, of the first that can be.

    Raises:
        NothingToConvert, BudgetError: as `make_plan`, for the recipe itself.
    """
    refused: list[BudgetError] = []
    for wanted in alternatives(recipe):
        try:
            return make_plan(info, wanted)[0]
        except BudgetError as error:
            refused.append(error)
        except NothingToConvert:
            if wanted is recipe:
                raise
    raise min(refused, key=lambda error: error.smallest)


def weights_of(info: ModelInfo, recipe: Recipe) -> dict[str, bool]:
    """The weights that a recipe governs, and whether each is stored as `(in, out)`."""
    slots = (
        slot
        for task in draft(info, recipe)
        for block in task.blocks
        for slot in block.slots.values()
    )
    return {slot.tensor: slot.transposed for slot in slots}


def alternatives(recipe: Recipe) -> list[Recipe]:
    """A recipe, and what else its schemes want tried at its budget; none without a budget."""
    found = [recipe]
    schemes = [make_scheme(rule.scheme, rule.options) for rule in recipe.rules]
    if recipe.budget is None and all(len(s.candidates()) == 1 for s in schemes):
        return found
    for i, rule in enumerate(recipe.rules):
        for other in schemes[i].alternatives():
            usual = type(other)().to_json()
            options = {k: v for k, v in other.to_json().items() if v != usual[k]}
            changed = dataclasses.replace(rule, scheme=other.name, options=options)
            rules = (*recipe.rules[:i], changed, *recipe.rules[i + 1 :])
            found.append(Recipe(rules, recipe.budget or Budget(OPEN_BUDGET)))
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


def _within(
    recipe: Recipe,
    info: ModelInfo,
    tasks: Sequence[Task],
    editor: WeightEditor | None,
    metrics: KfacMetrics,
) -> list[Draft]:
    """The groups with schemes and ranks that fill the budget, if there is one, and keep to it."""
    drafts = [d for task in tasks for d in task.drafts]
    parts = parts_of(tasks)
    is_open = any(len(part.candidates) > 1 for part in parts)
    wanted = recipe.budget or (Budget(OPEN_BUDGET) if is_open else None)
    if wanted is None:
        return drafts
    original = parameters_of(info)
    budget = wanted.resolve(original)
    least = with_least(drafts)
    stored = compile_plan(info, least).stored
    smallest = least_stored(info, tasks) if is_open else stored
    if smallest > budget:
        raise _too_small(recipe, wanted, info, smallest, budget, original)
    if editor is None:
        return allocate_evenly(least, max(0, budget - stored))
    if is_open:
        return choose(parts, budget - original + parameters_in(parts), editor, metrics)
    return allocate(least, budget - stored, editor, metrics)


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
    recipe: Recipe, wanted: Budget, info: ModelInfo, smallest: int, budget: int, original: int
) -> BudgetError:  # fmt: skip
    ways = [w for w in smaller_options(info, Recipe(recipe.rules)) if w[1] <= budget]
    asked_for = tuple(f"--scheme {rule.scheme} " for rule in recipe.rules)
    ways.sort(key=lambda way: not f"{way[0]} ".startswith(asked_for))
    what = "; ".join(f"{flags} reaches {_share(size, original)}" for flags, size in ways[:4])
    return BudgetError(
        f"{wanted.text} is {budget:,} parameters, and this recipe can't store less than "
        f"{_share(smallest, original)}",
        "Nothing was written",
        f"Ask for that or more{', or choose another way: ' + what if what else ''}",
        smallest=smallest,
    )


def _share(count: int, original: int) -> str:
    return f"{count:,} ({100 * count / original:.1f} %)"


def working(matrix: Tensor) -> Tensor:
    """A matrix in the precision that fits work in: float32, or float64 if it is that."""
    matrix = matrix.detach()
    # Contiguous, as a fit passes over it many times.
    return (matrix if matrix.dtype == torch.float64 else matrix.float()).contiguous()


def widened(tensor: Tensor) -> Tensor:
    """A tensor in the precision that moves are made in: float32 at least."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if half else tensor


def _nothing(recipe: Recipe, found: Sequence[tuple[str, Block]]) -> NothingToConvert:
    families = "; ".join(f"{f.name}: {f.pattern}" for f in all_families())
    schemes = all_schemes()
    wanted = "; ".join(f"{r.scheme}: {schemes[r.scheme].pattern}" for r in recipe.rules)
    ask = " (if --include names it alone)"
    saw = sorted({f"{f} {block.kind}{ask if block.opt_in else ''}" for f, block in found})
    return NothingToConvert(
        f"Nothing in this model can be converted by this recipe ({wanted})",
        f"Families looked for ({families}); found: {', '.join(saw) or 'none of them'}",
        "Try --scheme lowrank, widen --include, or write a family for it (docs/contributing.md)",
    )
