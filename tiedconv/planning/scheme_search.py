"""Choosing a scheme for each part of a model: the best parametrisation at a budget.

A rule whose scheme names several candidates (`auto`) leaves the choice open. For each block, and
for each stack as a whole, every candidate has a curve: the cost (see `metric`) that it leaves at
each size, from the spectra of what its ranks are spent on. At a price of a parameter, the best
candidate of a part is the one with the least cost plus price; the price is found by bisection so
that all of them together meet the budget. For convex curves that is the optimum (Lagrange), and
keeping a part as it is is one of the candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.numerics.least_squares import total_cost
from tiedconv.numerics.symmetries import Workbench
from tiedconv.planning.rank_allocation import Metrics, Place, fill, gains_of, metrics_of, with_least
from tiedconv.schemes import Draft, Scheme


@dataclass(frozen=True)
class Curve:
    """What one candidate leaves of the cost at each size.

    Args:
        drafts: at their least ranks.
        size: parameters stored there.
        cost: at full ranks.
        places: dials.
        gains: for each dial, the cost that each rank removes, beyond the least.
        prices: for each dial, parameters for each rank.
    """

    drafts: tuple[Draft, ...]
    size: int
    cost: float
    places: tuple[Place, ...] = ()
    gains: tuple[Tensor, ...] = ()
    prices: tuple[int, ...] = ()

    def at(self, price: float) -> tuple[float, int]:
        """Cost left and parameters stored, when every rank worth the price is taken."""
        cost, size = self.cost, self.size
        for gain, each in zip(self.gains, self.prices, strict=True):
            taken = int((gain > price * each).sum())
            cost += float(gain[taken:].sum())
            size += taken * each
        return cost, size


@dataclass(frozen=True)
class Menu:
    """Ways to store one stack.

    Args:
        each: for each of its blocks, the curves to choose one from.
        whole: curves for all blocks together.
    """

    each: tuple[tuple[Curve, ...], ...]
    whole: tuple[Curve, ...] = ()

    def best(self, price: float) -> list[Curve]:
        """The curves with the least cost plus price of their parameters."""

        def worth(curve: Curve) -> float:
            cost, size = curve.at(price)
            return cost + price * size

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


def choose(parts: Sequence[Part], budget: int, bench: Workbench, metrics: Metrics) -> list[Draft]:
    """The groups, with schemes and ranks, that leave the least cost within a budget.

    Args:
        parts: of the model.
        budget: parameters for the matrices of their blocks.
        bench: the weights.
        metrics: what errors cost.
    """
    menus = [menu for part in parts for menu in _menus(part, bench, metrics)]

    def chosen(price: float) -> list[Curve]:
        return [curve for menu in menus for curve in menu.best(price)]

    curves = chosen(_price(chosen, budget))
    places: list[Place] = []
    ratios: list[Tensor] = []
    drafts: list[Draft] = []
    for curve in curves:
        places += [(g + len(drafts), j) for g, j in curve.places]
        ratios += [g / p for g, p in zip(curve.gains, curve.prices, strict=True)]
        drafts += curve.drafts
    return fill(drafts, budget - sum(c.size for c in curves), places, ratios)


def _menus(part: Part, bench: Workbench, metrics: Metrics) -> list[Menu]:
    if len(part.candidates) == 1:  # nothing to choose but ranks
        drafts = with_least(list(part.candidates[0].drafts(part.blocks)))
        return [Menu(((_curve(drafts, part.blocks, bench, metrics),),))] if drafts else []
    menus: list[Menu] = []
    for blocks in _stacks(part.blocks):
        whole = tuple(_curves(part.candidates, blocks, bench, metrics))
        each = tuple(
            tuple(_curves(part.candidates, [b], bench, metrics, keep=True)) for b in blocks
        )
        menus.append(Menu(each, whole))
    return menus


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


def _price(chosen: Callable[[float], list[Curve]], budget: int) -> float:
    """The lowest price at which the choice is no larger than the budget."""
    low, high = 1e-30, 1e6
    for _ in range(60):
        middle = math.sqrt(low * high)
        if sum(curve.at(middle)[1] for curve in chosen(middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _curves(
    candidates: Sequence[Scheme],
    blocks: Sequence[Block],
    bench: Workbench,
    metrics: Metrics,
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
            found.append(_curve(drafts, blocks, bench, metrics))
    return found


def _curve(
    drafts: Sequence[Draft], blocks: Sequence[Block], bench: Workbench, metrics: Metrics
) -> Curve:
    floor = 0.0
    places: list[Place] = []
    gains: list[Tensor] = []
    prices: list[int] = []
    for g, d in enumerate(drafts):
        dials, found = d.scheme.dials(d.shapes), gains_of(d, bench, metrics)
        floor += _floor(d, bench, metrics)
        for j, (dial, gain) in enumerate(zip(dials, found, strict=True)):
            if dial is not None and gain is not None:
                places.append((g, j))
                gains.append(gain[dial.least : dial.most].float())
                # Ranks above `most` are never taken: what they would remove stays.
                floor += float(gain[dial.most :].sum())
                prices.append(dial.cost)
    size = _size(drafts, blocks)
    return Curve(tuple(drafts), size, floor, tuple(places), tuple(gains), tuple(prices))


def _floor(d: Draft, bench: Workbench, metrics: Metrics) -> float:
    """The cost that no rank removes: that of the scheme with every dial at its end."""
    matrices = bench.matrices(d.members)
    ends = [dial.full if dial else 0 for dial in d.scheme.dials(d.shapes)]
    scheme = d.scheme.turned(ends) if any(ends) else d.scheme
    factors = scheme.fit(matrices)
    weights = scheme.layout(d.shapes).weights
    return total_cost(weights, factors, matrices, metrics_of(d.members, metrics))


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
