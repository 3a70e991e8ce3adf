"""Spending a parameter budget on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.plan import Member, Slot
from tiedconv.numerics.kfac_metric import IDENTITY, Metric
from tiedconv.numerics.symmetries import Workbench
from tiedconv.schemes import Dial, Draft

Metrics = Mapping[str, Metric]
"""The metric of each weight by its tensor's name, in the orientation `(out, in)`."""

Place = tuple[int, int]
"""A dial: its draft's place and its own."""


def metrics_of(members: Sequence[Member], metrics: Metrics) -> list[Metric]:
    """The metric of each matrix as it takes part; the identity where none was measured.

    Where some were, a matrix without one reaches no answer on these images: errors of it count as
    little as those of the matrix that matters least, but not as nothing, as others may be shown.
    """
    found: list[Metric] = []
    for member in members:
        whole = metrics.get(member.slot.tensor) or _unseen(member.slot, metrics)
        part = whole.part(member.slot.start, member.slot.stop)
        found.append(part.flipped() if member.flip else part)
    return found


def _unseen(slot: Slot, metrics: Metrics) -> Metric:
    if not metrics:
        return IDENTITY
    return Metric(torch.eye(slot.stop) * min(m.weight for m in metrics.values()))


def gains_of(d: Draft, bench: Workbench, metrics: Metrics) -> list[Tensor | None]:
    """For each dial of a draft, the cost that each further rank removes."""
    if not has_dials(d):
        return [None] * (len(d.members) + 1)
    matrices = bench.matrices(d.members)
    return d.scheme.gains(matrices, metrics_of(d.members, metrics))


def allocate(
    drafts: Sequence[Draft], spare: int, bench: Workbench, metrics: Metrics | None = None
) -> list[Draft]:
    """Ranks that remove the most cost for the parameters spent.

    One more rank of a residual removes its next singular value squared (in the metric, if there
    is one), and costs `out + in`. Taking the best ratios first is exact for truncated SVDs
    (Eckart and Young) up to the size of the last step.

    Args:
        drafts: at their least ranks.
        spare: parameters to spend beyond those.
        bench: the weights.
        metrics: what errors cost; without them all weights count alike.
    """
    places: list[Place] = []
    ratios: list[Tensor] = []
    for g, d in enumerate(drafts):
        for j, gain in enumerate(gains_of(d, bench, metrics or {})):
            dial = d.scheme.dials(d.shapes)[j]
            if gain is not None and dial is not None:
                places.append((g, j))
                ratios.append(gain[dial.least : dial.most] / dial.cost)
    return fill(drafts, spare, places, ratios)


def fill(
    drafts: Sequence[Draft], spare: int, places: Sequence[Place], ratios: Sequence[Tensor]
) -> list[Draft]:
    """The drafts with their dials turned up, best ratio of gain to cost first."""
    ranks = _least(drafts)
    if places:
        costs = [_dial(drafts, place).cost for place in places]
        owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(ratios)])
        for i in owner[
            torch.argsort(torch.cat(list(ratios)), descending=True, stable=True)
        ].tolist():
            g, j = places[i]
            if costs[i] <= spare:
                spare -= costs[i]
                ranks[g][j] += 1
    return _settled(drafts, ranks)


def allocate_evenly(drafts: Sequence[Draft], spare: int) -> list[Draft]:
    """Ranks that are the same share of each matrix, for plans made without weights."""
    ranks = _least(drafts)
    dials = {
        (g, j): dial
        for g, d in enumerate(drafts)
        for j, dial in enumerate(d.scheme.dials(d.shapes))
        if dial is not None
    }
    full = sum((dial.most - dial.least) * dial.cost for dial in dials.values())
    share = min(1.0, spare / full) if full else 0.0
    for (g, j), dial in dials.items():
        more = int(share * (dial.most - dial.least))
        ranks[g][j] += more
        spare -= more * dial.cost
    for (g, j), dial in dials.items():  # what rounding left, one rank each
        if dial.cost <= spare and ranks[g][j] < dial.most:
            ranks[g][j] += 1
            spare -= dial.cost
    return _settled(drafts, ranks)


def with_least(drafts: Sequence[Draft]) -> list[Draft]:
    """The drafts with every dial at its least."""
    return _settled(drafts, _least(drafts))


def has_dials(d: Draft) -> bool:
    """Whether a budget can turn anything here."""
    return any(dial is not None for dial in d.scheme.dials(d.shapes))


def _dial(drafts: Sequence[Draft], place: Place) -> Dial:
    d = drafts[place[0]]
    dial = d.scheme.dials(d.shapes)[place[1]]
    assert dial is not None
    return dial


def _least(drafts: Sequence[Draft]) -> list[list[int]]:
    return [[dial.least if dial else 0 for dial in d.scheme.dials(d.shapes)] for d in drafts]


def _settled(drafts: Sequence[Draft], ranks: list[list[int]]) -> list[Draft]:
    return [
        dataclasses.replace(d, scheme=d.scheme.turned(r)) if has_dials(d) else d
        for d, r in zip(drafts, ranks, strict=True)
    ]
