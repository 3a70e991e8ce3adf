"""Choosing a scheme for each part of a model: the best parametrisation at a budget.

A rule whose scheme names several candidates (`auto`) leaves the choice open. For each block, and
for each stack as a whole, every candidate has a curve: the error (see `kfac_metric`) that remains
at each size, from the spectra of the residuals. At a Lagrange multiplier (cost per parameter), the
best candidate of a part is the one with the least error plus multiplier times parameters; the
multiplier is found by bisection so that all of them together meet the budget. For convex curves
that is the optimum, and keeping a part unchanged is one of the candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tiedconv.core.plan import Block
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
from tiedconv.schemes import Draft, Scheme

_LARGEST = 1e300  # multiplier that is tried
_STEP = 2.0**20  # between multipliers, until one is too large and the next is not


@dataclass(frozen=True)
class Curve:
    """What one candidate leaves of the cost at each size.

    Args:
        drafts: at their least ranks.
        size: parameters stored there.
        cost: at full ranks.
        places: rank_options.
        gains: for each option, the cost that each rank removes, beyond the least.
        rank_costs: for each option, parameters for each rank.
    """

    drafts: tuple[Draft, ...]
    size: int
    cost: float
    places: tuple[RankIndex, ...] = ()
    gains: tuple[Tensor, ...] = ()
    rank_costs: tuple[int, ...] = ()

    def at(self, multiplier: float) -> tuple[float, int]:
        """Cost left and parameters stored, when every rank worth the multiplier is taken."""
        cost, size = self.cost, self.size
        for gain, each in zip(self.gains, self.rank_costs, strict=True):
            taken = int((gain > multiplier * each).sum())
            cost += float(gain[taken:].sum())
            size += taken * each
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

    def best(self, multiplier: float) -> list[Curve]:
        """The curves with the least cost plus multiplier of their parameters."""

        def worth(curve: Curve) -> float:
            cost, size = curve.at(multiplier)
            return cost + multiplier * size

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
    parts: Sequence[Part], budget: int, editor: WeightEditor, metrics: KfacMetrics
) -> list[Draft]:
    """The groups, with schemes and ranks, that leave the least cost within a budget.

    Args:
        parts: of the model.
        budget: parameters for the matrices of their blocks.
        editor: the weights.
        metrics: what errors cost.
    """
    options = [stack for part in parts for stack in _options_of_stacks(part, editor, metrics)]

    def chosen(multiplier: float) -> list[Curve]:
        return [curve for stack in options for curve in stack.best(multiplier)]

    curves = chosen(_lagrange_multiplier(chosen, budget))
    places: list[RankIndex] = []
    ratios: list[Tensor] = []
    drafts: list[Draft] = []
    for curve in curves:
        places += [(g + len(drafts), j) for g, j in curve.places]
        ratios += [g / p for g, p in zip(curve.gains, curve.rank_costs, strict=True)]
        drafts += curve.drafts
    return fill(drafts, budget - sum(c.size for c in curves), places, ratios)


def _options_of_stacks(
    part: Part, editor: WeightEditor, metrics: KfacMetrics
) -> list[StackOptions]:
    if len(part.candidates) == 1:  # nothing to choose but ranks
        drafts = with_least(list(part.candidates[0].drafts(part.blocks)))
        return [StackOptions(((_curve(drafts, part.blocks, editor, metrics),),))] if drafts else []
    options: list[StackOptions] = []
    for blocks in _stacks(part.blocks):
        whole = tuple(_curves(part.candidates, blocks, editor, metrics))
        each = tuple(
            tuple(_curves(part.candidates, [b], editor, metrics, keep=True)) for b in blocks
        )
        options.append(StackOptions(each, whole))
    return options


def least_size(part: Part) -> int:
    """The fewest parameters that any mixture of the candidates stores for a part's blocks."""
    if len(part.candidates) == 1:
        return _least_of(part.candidates, part.blocks)
    return sum(
        min(
            sum(_least_of(part.candidates, [block]) for block in blocks),
            _least_of(part.candidates, blocks),
        )
        for blocks in _stacks(part.blocks)
    )


def _least_of(candidates: Sequence[Scheme], blocks: Sequence[Block]) -> int:
    return min(_size(with_least(list(c.drafts(blocks))), blocks) for c in candidates)


def _stacks(blocks: Sequence[Block]) -> list[list[Block]]:
    stacks: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        stacks[block.stack].append(block)
    return list(stacks.values())


def _lagrange_multiplier(chosen: Callable[[float], list[Curve]], budget: int) -> float:
    """The lowest cost per parameter at which the choice is no larger than the budget.

    Costs have the scale of the squared weights, so the search starts from no scale of its own.
    """

    def fits(multiplier: float) -> bool:
        return sum(curve.at(multiplier)[1] for curve in chosen(multiplier)) <= budget

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
    editor: WeightEditor,
    metrics: KfacMetrics,
    *,
    keep: bool = False,
) -> list[Curve]:
    """The curve of every candidate that makes something of these blocks; `keep` adds none."""
    found = [Curve((), _size([], blocks), 0.0)] if keep else []
    seen: list[object] = []
    for candidate in candidates:
        drafts = with_least(list(candidate.drafts(blocks)))
        spans = any(len({_block_of(m.slot.tensor, blocks) for m in d.members}) > 1 for d in drafts)
        alike = [(d.members, d.scheme.layout(d.shapes)) for d in drafts]
        if drafts and (keep or spans) and alike not in seen:
            seen.append(alike)
            found.append(_curve(drafts, blocks, editor, metrics))
    return found


def _curve(
    drafts: Sequence[Draft], blocks: Sequence[Block], editor: WeightEditor, metrics: KfacMetrics
) -> Curve:
    floor = 0.0
    places: list[RankIndex] = []
    gains: list[Tensor] = []
    rank_costs: list[int] = []
    for g, d in enumerate(drafts):
        rank_options, found = d.scheme.rank_options(d.shapes), gains_of(d, editor, metrics)
        floor += _floor(d, editor, metrics)
        for j, (option, gain) in enumerate(zip(rank_options, found, strict=True)):
            if option is not None and gain is not None:
                places.append((g, j))
                gains.append(gain[option.min_rank : option.break_even_rank].float())
                # Ranks above `most` are never taken: what they would remove stays.
                floor += float(gain[option.break_even_rank :].sum())
                rank_costs.append(option.params_per_rank)
    size = _size(drafts, blocks)
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


def _size(drafts: Sequence[Draft], blocks: Sequence[Block]) -> int:
    """Parameters stored for the matrices of some blocks, converted or not."""
    converted = {m.slot for d in drafts for m in d.members}
    total = sum(s.numel for b in blocks for s in b.slots.values())
    total -= sum(slot.numel for slot in converted)
    return total + sum(
        math.prod(shape) for d in drafts for shape in d.scheme.layout(d.shapes).factors.values()
    )


def _block_of(tensor: str, blocks: Sequence[Block]) -> str:
    return next(b.name for b in blocks if any(s.tensor == tensor for s in b.slots.values()))
