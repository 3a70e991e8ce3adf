"""Choosing a scheme for each part of a model: the best parametrisation at a budget.

A rule whose scheme names several candidates (`auto`) leaves the choice open. For each block, and
for each stack as a whole, every candidate has a curve: the error (see `kfac_metric`) that remains
at each size, from the spectra of the residuals. At a Lagrange multiplier (cost per parameter, or
per unit of work), the best candidate of a part is the one with the least error plus multiplier
times parameters; the multiplier is found by bisection so that all of them together meet the budget.
For convex curves that is the optimum, and keeping a part unchanged is one of the candidates.

Where both are limited, a mixture of both prices is bisected too, until neither limit is met with
room to spare while the other decides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.core.workload import Workload
from tiedconv.numerics.least_squares import total_cost
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.rank_allocation import (
    KfacMetrics,
    RankIndex,
    fill,
    gains_of,
    metrics_of,
    with_least,
)
from tiedconv.planning.resources import (
    Resources,
    is_mixed,
    of_blocks,
    of_drafts,
    of_ranks,
    prices,
    total,
)
from tiedconv.schemes import Draft, Scheme

_MIXINGS = 8  # of prices, where parameters and work are both limited
_LARGEST = 1e300  # multiplier that is tried
_STEP = 2.0**20  # between multipliers, until one is too large and the next is not


@dataclass(frozen=True)
class Curve:
    """What one candidate leaves of the cost at each size.

    Args:
        drafts: at their least ranks.
        size: what is taken there.
        cost: at full ranks.
        places: rank_options.
        gains: for each option, the cost that each rank removes, beyond the least.
        rank_costs: for each option, what each rank takes.
    """

    drafts: tuple[Draft, ...]
    size: Resources
    cost: float
    places: tuple[RankIndex, ...] = ()
    gains: tuple[Tensor, ...] = ()
    rank_costs: tuple[Resources, ...] = ()

    def at(self, price: Resources) -> tuple[float, Resources]:
        """Cost left and what is taken, when every rank worth the price is taken."""
        cost, size = self.cost, self.size
        for gain, each in zip(self.gains, self.rank_costs, strict=True):
            taken = int((gain > each.at(price)).sum())
            cost += float(gain[taken:].sum())
            size += each.times(taken)
        return cost, size


@dataclass(frozen=True)
class StackOptions:
    """Ways to store one stack.

    Args:
        each: for each of its blocks, the curves to choose one from.
        whole: curves for all blocks together.
    """

    each: tuple[tuple[Curve, ...], ...]
    whole: tuple[Curve, ...] = ()

    def best(self, price: Resources) -> list[Curve]:
        """The curves with the least cost plus the price of what they take."""

        def worth(curve: Curve) -> float:
            cost, size = curve.at(price)
            return cost + size.at(price)

        apart = [min(curves, key=worth) for curves in self.each]
        together = min(self.whole, key=worth, default=None)
        if together is not None and worth(together) < sum(map(worth, apart)):
            return [together]
        return apart


@dataclass(frozen=True)
class Part:
    """Blocks that one rule governs, and the schemes it may use for each."""

    candidates: tuple[Scheme, ...]
    blocks: tuple[Block, ...]


def choose(
    parts: Sequence[Part],
    budget: Resources,
    editor: WeightEditor,
    metrics: KfacMetrics,
    workload: Workload | None = None,
) -> list[Draft]:
    """The groups, with schemes and ranks, that leave the least cost within a budget.

    Args:
        parts: of the model.
        budget: for the matrices of their blocks.
        editor: the weights.
        metrics: what errors cost.
        workload: of the model, where its work is limited.
    """
    weights = _Weights(editor, metrics, workload)
    options = [stack for part in parts for stack in _options_of_stacks(part, weights)]

    def chosen(price: Resources) -> list[Curve]:
        return [curve for stack in options for curve in stack.best(price)]

    price = _price(chosen, budget)
    curves = chosen(price)
    places: list[RankIndex] = []
    gains: list[Tensor] = []
    costs: list[Resources] = []
    drafts: list[Draft] = []
    for curve in curves:
        places += [(g + len(drafts), j) for g, j in curve.places]
        gains += curve.gains
        costs += curve.rank_costs
        drafts += curve.drafts
    spare = budget - total(c.size for c in curves)
    return fill(drafts, spare, places, gains, costs, price).drafts


@dataclass(frozen=True)
class _Weights:
    """What curves are drawn from."""

    editor: WeightEditor
    metrics: KfacMetrics
    workload: Workload | None


def _options_of_stacks(part: Part, weights: _Weights) -> list[StackOptions]:
    if len(part.candidates) == 1:  # nothing to choose but ranks
        drafts = with_least(list(part.candidates[0].drafts(part.blocks)))
        return [StackOptions(((_curve(drafts, part.blocks, weights),),))] if drafts else []
    options: list[StackOptions] = []
    for blocks in _stacks(part.blocks):
        whole = tuple(_curves(part.candidates, blocks, weights))
        each = tuple(tuple(_curves(part.candidates, [b], weights, keep=True)) for b in blocks)
        options.append(StackOptions(each, whole))
    return options


def least_of(part: Part, workload: Workload | None = None) -> Resources:
    """The fewest parameters, and the least work, of any mixture of the candidates.

    Each by itself: no mixture need reach both.
    """
    if len(part.candidates) == 1:
        return _least(part.candidates, part.blocks, workload)
    return total(
        _fewest(
            total(_least(part.candidates, [block], workload) for block in blocks),
            _least(part.candidates, blocks, workload),
        )
        for blocks in _stacks(part.blocks)
    )


def _least(
    candidates: Sequence[Scheme], blocks: Sequence[Block], workload: Workload | None
) -> Resources:
    return _fewest(
        *(of_drafts(with_least(list(c.drafts(blocks))), blocks, workload) for c in candidates)
    )


def _fewest(*found: Resources) -> Resources:
    return Resources(min(one.params for one in found), min(one.work for one in found))


def _stacks(blocks: Sequence[Block]) -> list[list[Block]]:
    stacks: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        stacks[block.stack].append(block)
    return list(stacks.values())


def _price(chosen: Callable[[Resources], list[Curve]], budget: Resources) -> Resources:
    """The price of a parameter and of a unit of work at which what is chosen meets the budget."""

    def taken(price: Resources) -> tuple[float, Resources]:
        found = [curve.at(price) for curve in chosen(price)]
        return sum(cost for cost, _ in found), total(size for _, size in found)

    def meeting(mix: float, limit: Resources = budget) -> Resources:
        unit = prices(budget, mix)
        multiplier = _lagrange_multiplier(lambda m: taken(unit.times(m))[1].within(limit))
        return unit.times(multiplier)

    if not is_mixed(budget):
        return meeting(0.0)
    for mix, limit in ((0.0, Resources(budget.params, math.inf)), (1.0, _work_alone(budget))):
        price = meeting(mix, limit)
        if taken(price)[1].within(budget):
            return price  # this limit decides alone
    low, high = 0.0, 1.0
    best = (math.inf, Resources())
    for _ in range(_MIXINGS):
        mix = (low + high) / 2
        price = meeting(mix)
        cost, size = taken(price)
        best = min(best, (cost, price), key=lambda one: one[0])
        params_decide = size.params / budget.params > size.work / budget.work
        low, high = (low, mix) if params_decide else (mix, high)
    return best[1]


def _work_alone(budget: Resources) -> Resources:
    return Resources(math.inf, budget.work)


def _lagrange_multiplier(fits: Callable[[float], bool]) -> float:
    """The lowest multiplier at which the choice is no larger than the budget.

    Costs have the scale of the squared weights, so the search starts from no scale of its own.
    """
    high = 1.0
    while not fits(high) and high < _LARGEST:
        high *= _STEP
    low = high / _STEP
    while fits(low) and low > 1 / _LARGEST:
        high, low = low, low / _STEP
    for _ in range(60):
        middle = math.sqrt(low * high)
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _curves(
    candidates: Sequence[Scheme],
    blocks: Sequence[Block],
    weights: _Weights,
    *,
    keep: bool = False,
) -> list[Curve]:
    """The curve of every candidate that makes something of these blocks; `keep` adds none."""
    found = [Curve((), of_blocks(blocks, weights.workload), 0.0)] if keep else []
    seen: list[object] = []
    for candidate in candidates:
        drafts = with_least(list(candidate.drafts(blocks)))
        spans = any(len({_block_of(m.slot.tensor, blocks) for m in d.members}) > 1 for d in drafts)
        alike = [(d.members, d.scheme.layout(d.shapes)) for d in drafts]
        if drafts and (keep or spans) and alike not in seen:
            seen.append(alike)
            found.append(_curve(drafts, blocks, weights))
    return found


def _curve(drafts: Sequence[Draft], blocks: Sequence[Block], weights: _Weights) -> Curve:
    floor = 0.0
    places: list[RankIndex] = []
    gains: list[Tensor] = []
    rank_costs: list[Resources] = []
    for g, d in enumerate(drafts):
        found = gains_of(d, weights.editor, weights.metrics)
        costs = of_ranks(d, weights.workload)
        floor += _floor(d, weights.editor, weights.metrics)
        for j, option in enumerate(d.scheme.rank_options(d.shapes)):
            gain, cost = found[j], costs[j]
            if option is not None and gain is not None and cost is not None:
                places.append((g, j))
                gains.append(gain[option.min_rank : option.break_even_rank].float())
                # Ranks above `most` are never taken: what they would remove stays.
                floor += float(gain[option.break_even_rank :].sum())
                rank_costs.append(cost)
    size = of_drafts(drafts, blocks, weights.workload)
    return Curve(tuple(drafts), size, floor, tuple(places), tuple(gains), tuple(rank_costs))


def _floor(d: Draft, editor: WeightEditor, metrics: KfacMetrics) -> float:
    """The cost that no rank removes: that of the scheme with every option at its end."""
    matrices = editor.matrices(d.members)
    ends = [option.full_rank if option else 0 for option in d.scheme.rank_options(d.shapes)]
    scheme = d.scheme.with_ranks(ends) if any(ends) else d.scheme
    measures = scheme.measures(d.shapes, metrics_of(d.members, metrics))
    factors = scheme.fit_measured(matrices, measures)
    weights = scheme.layout(d.shapes).weights
    return total_cost(weights, factors, matrices, measures)


def _block_of(tensor: str, blocks: Sequence[Block]) -> str:
    return next(b.name for b in blocks if any(s.tensor == tensor for s in b.slots.values()))
