"""Spending a budget of parameters, of work or of both on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.core.plan import Member, Plan, Slot
from tiedconv.core.workload import Workload
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.resources import Resources, is_mixed, of_ranks, prices, spread, total
from tiedconv.schemes import Draft, RankOption

ROUNDS = 6
"""Of an allocation, until the budget is used."""

CLOSE = 0.005
"""Of a budget: so little need not be used."""

KfacMetrics = Mapping[str, KfacMetric]
"""The metric of each weight by its tensor's name, in the orientation `(out, in)`."""

MIXES = 8
"""Steps from a price on parameters alone to one on work alone, where both are limited."""

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
    drafts: Sequence[Draft],
    spare: Resources,
    editor: WeightEditor,
    metrics: KfacMetrics | None = None,
    workload: Workload | None = None,
) -> list[Draft]:
    """Ranks that remove the most cost for what is spent.

    One more rank of a residual removes its next singular value squared (in the metric, if there
    is one), and takes `out + in` parameters. Taking the best ratios first is exact for truncated
    SVDs (Eckart and Young) up to the size of the last step.

    Args:
        drafts: at their least ranks.
        spare: to spend beyond those.
        editor: the weights.
        metrics: what errors cost; without them all weights count alike.
        workload: of the model, where its work is limited.
    """
    places: list[RankIndex] = []
    gains: list[Tensor] = []
    costs: list[Resources] = []
    for g, d in enumerate(drafts):
        taken = of_ranks(d, workload)
        for j, gain in enumerate(gains_of(d, editor, metrics or {})):
            option, cost = d.scheme.rank_options(d.shapes)[j], taken[j]
            if gain is not None and option is not None and cost is not None:
                places.append((g, j))
                gains.append(gain[option.min_rank : option.break_even_rank])
                costs.append(cost)
    mixes = [i / MIXES for i in range(MIXES + 1)] if is_mixed(spare) else [0.0]
    tried = [fill(drafts, spare, places, gains, costs, prices(spare, mix)) for mix in mixes]
    return max(tried, key=lambda filled: filled.gain).drafts


@dataclass(frozen=True)
class Filled:
    """Drafts at the ranks that `fill` chose, and the cost that these remove."""

    drafts: list[Draft]
    gain: float


def fill(
    drafts: Sequence[Draft],
    spare: Resources,
    places: Sequence[RankIndex],
    gains: Sequence[Tensor],
    costs: Sequence[Resources],
    price: Resources,
) -> Filled:
    """The drafts with more ranks, best ratio of gain to price first.

    Args:
        drafts: at their least ranks.
        spare: what may be spent.
        places: of the options.
        gains: for each option, the cost that each further rank removes.
        costs: for each option, what a rank takes.
        price: of a parameter and of a unit of work.
    """
    ranks = _least(drafts)
    gained = 0.0
    if places:
        owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(gains)])
        ratios = [gain / cost.worth(price) for gain, cost in zip(gains, costs, strict=True)]
        for i in owner[torch.argsort(torch.cat(ratios), descending=True, stable=True)].tolist():
            g, j = places[i]
            if costs[i].within(spare):
                spare -= costs[i]
                ranks[g][j] += 1
        least = _least(drafts)
        gained = sum(
            float(gain[: ranks[g][j] - least[g][j]].sum())
            for (g, j), gain in zip(places, gains, strict=True)
        )
    return Filled(_finalize(drafts, ranks), gained)


def using_all(
    plan: Plan, spare: Resources, budget: int, chosen: Callable[[Resources], Plan]
) -> Plan:
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
        larger = chosen(spare + Resources(more))
        if larger.stored > budget:
            more //= 2
            continue
        if larger.stored == plan.stored:
            break
        plan, spare = larger, spare + Resources(more)
        more = budget - plan.stored
    return plan


def allocate_evenly(
    drafts: Sequence[Draft], spare: Resources, workload: Workload | None = None
) -> list[Draft]:
    """Ranks that are the same share of each matrix, for plans made without weights."""
    ranks = _least(drafts)
    found: dict[RankIndex, tuple[RankOption, Resources]] = {}
    for g, d in enumerate(drafts):
        for j, (option, cost) in enumerate(
            zip(d.scheme.rank_options(d.shapes), of_ranks(d, workload), strict=True)
        ):
            if option is not None and cost is not None:
                found[g, j] = option, cost
    full = total(cost.times(spread(option)) for option, cost in found.values())
    pairs = ((spare.params, full.params), (spare.work, full.work))
    share = min([1.0, *(left / whole for left, whole in pairs if whole)]) if full.params else 0.0
    for (g, j), (option, cost) in found.items():
        more = int(share * spread(option))
        ranks[g][j] += more
        spare -= cost.times(more)
    for (g, j), (option, cost) in found.items():  # what rounding left, one rank each
        if cost.within(spare) and ranks[g][j] < option.break_even_rank:
            ranks[g][j] += 1
            spare -= cost
    return _finalize(drafts, ranks)


def with_least(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with every option at its least."""
    return _finalize(drafts, _least(drafts))


def has_rank_options(d: Draft) -> bool:
    """Whether a budget can turn anything here."""
    return any(option is not None for option in d.scheme.rank_options(d.shapes))


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
