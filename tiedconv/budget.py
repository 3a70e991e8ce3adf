"""Spending a parameter budget on ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from tiedconv.gauge import Workbench
from tiedconv.linalg import spectrum
from tiedconv.schemes import Draft

Ranks = list[list[int]]


def allocate(drafts: Sequence[Draft], spare: int, bench: Workbench) -> list[Draft]:
    """Ranks that remove the most squared error for the parameters spent.

    One more rank of a residual removes its next singular value squared, and costs `out + in`.
    Taking the best ratios first is exact for truncated SVDs (Eckart and Young) up to the size of
    the last step.

    Args:
        drafts: at their least ranks.
        spare: parameters to spend beyond those.
        bench: the weights.
    """
    places: list[tuple[int, int]] = []
    gains: list[torch.Tensor] = []
    for g, d in enumerate(drafts):
        if not any(d.scheme.rank_slots(len(d.members))):
            continue
        matrices = [m.matrix_of(bench.tensors[m.slot.tensor]).float() for m in d.members]
        for j, residual in enumerate(d.scheme.residuals(matrices)):
            if residual is not None:
                values = spectrum(residual)[d.scheme.least_rank : _most(d, j)]
                places.append((g, j))
                gains.append(values.square() / sum(d.shapes[j]))
    ranks = _least(drafts)
    if not places:
        return _settled(drafts, ranks)
    owner = torch.cat([torch.full((len(v),), i) for i, v in enumerate(gains)])
    for i in owner[torch.argsort(torch.cat(gains), descending=True, stable=True)].tolist():
        g, j = places[i]
        cost = sum(drafts[g].shapes[j])
        if cost <= spare:
            spare -= cost
            ranks[g][j] += 1
    return _settled(drafts, ranks)


def allocate_evenly(drafts: Sequence[Draft], spare: int) -> list[Draft]:
    """Ranks that are the same share of each matrix, for plans made without weights."""
    ranks = _least(drafts)
    slots = [
        (g, j)
        for g, d in enumerate(drafts)
        for j, takes in enumerate(d.scheme.rank_slots(len(d.members)))
        if takes
    ]
    room = {(g, j): _most(drafts[g], j) - ranks[g][j] for g, j in slots}
    full = sum(n * sum(drafts[g].shapes[j]) for (g, j), n in room.items())
    share = min(1.0, spare / full) if full else 0.0
    for g, j in slots:
        more = int(share * room[g, j])
        ranks[g][j] += more
        spare -= more * sum(drafts[g].shapes[j])
    for g, j in slots:  # what rounding left, one rank each
        cost = sum(drafts[g].shapes[j])
        if cost <= spare and ranks[g][j] < _most(drafts[g], j):
            ranks[g][j] += 1
            spare -= cost
    return _settled(drafts, ranks)


def _least(drafts: Sequence[Draft]) -> Ranks:
    return [
        [d.scheme.least_rank if takes else 0 for takes in d.scheme.rank_slots(len(d.members))]
        for d in drafts
    ]


def _most(d: Draft, j: int) -> int:
    """The rank above which two factors would be larger than the matrix itself."""
    out, inputs = d.shapes[j]
    return max(d.scheme.least_rank, out * inputs // (out + inputs))


def _settled(drafts: Sequence[Draft], ranks: Ranks) -> list[Draft]:
    return [
        dataclasses.replace(d, scheme=d.scheme.with_ranks(r)) if _takes(d) else d
        for d, r in zip(drafts, ranks, strict=True)
    ]


def _takes(d: Draft) -> bool:
    return any(d.scheme.rank_slots(len(d.members)))
