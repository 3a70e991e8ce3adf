"""Which groups a recipe makes of a model, from names and shapes alone, and their plan."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tiedconv.core.assemble import assemble, member_expr
from tiedconv.core.expr import Expr
from tiedconv.core.plan import Block, Group, Member, Plan, Slot, stored_name
from tiedconv.errors import NothingToConvert, RecipeError
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.coverage import coverage
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.planning.scheme_search import Part
from tiedconv.schemes import Draft, Scheme, all_schemes, make_scheme

KEPT = "kept"  # the scheme's name of rows that share a tensor with converted ones


@dataclass(frozen=True)
class Task:
    """What one rule makes of a model: its scheme, the blocks it governs, the groups drafted."""

    scheme: Scheme
    blocks: tuple[Block, ...]
    drafts: tuple[Draft, ...]


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


def parameters_of(info: ModelInfo) -> int:
    """Parameters of the original."""
    return sum(math.prod(s) for s in info.parameters.values())


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
