"""Spending a parameter budget on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.plan import Member, Plan, Slot
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes import Draft, RankOption

ROUNDS = 6
"""Of an allocation, until the budget is used."""

CLOSE = 0.005
"""Of a budget: so little need not be used."""

KfacMetrics = Mapping[str, KfacMetric]
"""The metric of each weight by its tensor's name, in the orientation `(out, in)`."""

RankIndex = tuple[int, int]
"""One rank that can be chosen: index of its draft, index of the rank option in it."""


def metrics_of(members: Sequence[Member], metrics: KfacMetrics) -> list[KfacMetric]:
    """The metric of each matrix as it takes part; the identity where none was measured.

    Where some were, a matrix without one reaches no answer on these images: errors of it count as
    little as those of the matrix that matters least, but not as nothing, as others may be shown.
    """
    found: list[KfacMetric] = []
    for member in members:
        whole = metrics.get(member.slot.tensor) or _unseen(member.slot, metrics)
        part = whole.part(member.slot.start, member.slot.stop)
        found.append(part.flipped() if member.flip else part)
    return found


def _unseen(slot: Slot, metrics: KfacMetrics) -> KfacMetric:
    if not metrics:
        return IDENTITY
    return KfacMetric(torch.eye(slot.stop) * min(m.weight for m in metrics.values()))


def gains_of(d: Draft, editor: WeightEditor, metrics: KfacMetrics) -> list[Tensor | None]:
    """For each option of a draft, the cost that each further rank removes."""
    if not has_rank_options(d):
        return [None] * (len(d.members) + 1)
    matrices = editor.matrices(d.members)
    return d.scheme.gains(matrices, metrics_of(d.members, metrics))


def allocate(
    drafts: Sequence[Draft], spare: int, editor: WeightEditor, metrics: KfacMetrics | None = None
) -> list[Draft]:
    """Ranks that remove the most cost for the parameters spent.

    One more rank of a residual removes its next singular value squared (in the metric, if there
    is one), and costs `out + in`. Taking the best ratios first is exact for truncated SVDs
    (Eckart and Young) up to the size of the last step.

    Args:
        drafts: at their least ranks.
        spare: parameters to spend beyond those.
        editor: the weights.
        metrics: what errors cost; without them all weights count alike.
    """
    places: list[RankIndex] = []
    ratios: list[Tensor] = []
    for g, d in enumerate(drafts):
        for j, gain in enumerate(gains_of(d, editor, metrics or {})):
            option = d.scheme.rank_options(d.shapes)[j]
            if gain is not None and option is not None:
                places.append((g, j))
                ratios.append(
                    gain[option.min_rank : option.break_even_rank] / option.params_per_rank
                )
    return fill(drafts, spare, places, ratios)


def fill(
    drafts: Sequence[Draft], spare: int, places: Sequence[RankIndex], ratios: Sequence[Tensor]
) -> list[Draft]:
    """The drafts with their rank_options with_ranks up, best ratio of gain to cost first."""
    ranks = _least(drafts)
    if places:
        costs = [_option_at(drafts, place).params_per_rank for place in places]
        owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(ratios)])
        for i in owner[
            torch.argsort(torch.cat(list(ratios)), descending=True, stable=True)
        ].tolist():
            g, j = places[i]
            if costs[i] <= spare:
                spare -= costs[i]
                ranks[g][j] += 1
    return _finalize(drafts, ranks)


def using_all(plan: Plan, spare: int, budget: int, chosen: Callable[[int], Plan]) -> Plan:
    """The plan that uses a budget where ranks are sides of one matrix: it stores less than counted.

    Args:
        plan: of the counted parameters `spare`.
        budget: parameters that may be stored.
        chosen: the plan of so many counted parameters.
    """
    more = budget - plan.stored
    for _ in range(ROUNDS):
        if budget - plan.stored <= CLOSE * budget or not more:
            break
        larger = chosen(spare + more)
        if larger.stored > budget:
            more //= 2
            continue
        if larger.stored == plan.stored:
            break
        plan, spare = larger, spare + more
        more = budget - plan.stored
    return plan


def allocate_evenly(drafts: Sequence[Draft], spare: int) -> list[Draft]:
    """Ranks that are the same share of each matrix, for plans made without weights."""
    ranks = _least(drafts)
    rank_options = {
        (g, j): option
        for g, d in enumerate(drafts)
        for j, option in enumerate(d.scheme.rank_options(d.shapes))
        if option is not None
    }
    full = sum(
        (option.break_even_rank - option.min_rank) * option.params_per_rank
        for option in rank_options.values()
    )
    share = min(1.0, spare / full) if full else 0.0
    for (g, j), option in rank_options.items():
        more = int(share * (option.break_even_rank - option.min_rank))
        ranks[g][j] += more
        spare -= more * option.params_per_rank
    for (g, j), option in rank_options.items():  # what rounding left, one rank each
        if option.params_per_rank <= spare and ranks[g][j] < option.break_even_rank:
            ranks[g][j] += 1
            spare -= option.params_per_rank
    return _finalize(drafts, ranks)


def with_least(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with every option at its least."""
    return _finalize(drafts, _least(drafts))


def has_rank_options(d: Draft) -> bool:
    """Whether a budget can turn anything here."""
    return any(option is not None for option in d.scheme.rank_options(d.shapes))


def _option_at(drafts: Sequence[Draft], place: RankIndex) -> RankOption:
    d = drafts[place[0]]
    option = d.scheme.rank_options(d.shapes)[place[1]]
    assert option is not None
    return option


def _least(drafts: Sequence[Draft]) -> list[list[int]]:
    return [
        [option.min_rank if option else 0 for option in d.scheme.rank_options(d.shapes)]
        for d in drafts
    ]


def _finalize(drafts: Sequence[Draft], ranks: list[list[int]]) -> list[Draft]:
    return [
        dataclasses.replace(d, scheme=d.scheme.with_ranks(r)) if has_rank_options(d) else d
        for d, r in zip(drafts, ranks, strict=True)
    ]
