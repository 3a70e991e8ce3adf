"""Basis: all matrices on one residual stream share one row space or column space.

The matrices of a block that read the stream (q, k, v, up, conv1) have rows in its space, those
that write to it (o, down, conv3) have columns there. One V `(rank, d)` spans it for all of them:

    [W_q; W_k; W_v; W_o^T] = C V          W_up = C_1 V,  W_down = V^T C_2

so each matrix stores its coefficients C only, and V is stored once for a block, or once for a
group of blocks. With `tie`, W_o shares the coefficients of W_v and W_down those of W_up, row by
row up to a scale: the row and column space of a low-rank pair, after Koyun and Toreyin
(https://arxiv.org/abs/2401.16438).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.core.expr import Expr, MatMul, Mul, Ref, Shape
from tiedconv.core.partition import partition
from tiedconv.core.plan import Block, Member
from tiedconv.core.units import matrices_of
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import KfacMetric, mean_metric
from tiedconv.numerics.linalg import shared_with_scales, spectrum, truncate
from tiedconv.schemes._base import Draft, FactoredBase, Layout
from tiedconv.schemes._stacks import fuse

_READS = {"q", "k", "v", "qk", "kv", "qkv", "up", "conv1"}
_WRITES = {"o", "down", "conv3"}
_PAIR = {"o": "v", "down": "up", "conv3": "conv1"}


@dataclass(frozen=True)
class Basis(FactoredBase):
    """One basis for all matrices that read from or write to one residual stream.

    Args:
        base_rank: rank of the basis: a number, or a fraction of the matrices' parameters (below 1).
        groups: blocks of a stack that share a basis: `each` (none), `adjacent:N`, `all`.
        join: attention and feed-forward of a layer share one basis.
        tie: the matrix that writes shares the coefficients of one that reads.
        owners: for each matrix, the place of the one whose coefficients it uses; the plan says.
    """

    name: ClassVar[str] = "basis"
    base_name: ClassVar[str] = "V"
    pattern: ClassVar[str] = "blocks on a residual stream: attention, feed-forward, bottleneck"
    smaller_options: ClassVar = ({"base_rank": 0.25}, {"tie": True})

    base_rank: int | float = 0.5
    groups: str = "each"
    join: bool = False
    tie: bool = False
    owners: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.base_rank:
            raise SchemeError(
                "Invalid base_rank=0 of scheme basis",
                "Its basis would be empty",
                "Use a whole number from 1 on, or a fraction below 1",
                code="invalid-rank",
            )

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        if self.owners:
            raise SchemeError(
                "The option owners of scheme basis is set by the plan",
                hint="Use tie=true, which sets it",
                code="internal-option",
            )
        stacks: dict[tuple[str, int], dict[int, list[_Part]]] = defaultdict(dict)
        for block in blocks:
            for part in self._parts(block):
                layers = stacks[part.stack, part.member.shape[1]]
                layers.setdefault(block.index, []).append(part)
        for (_, width), layers in stacks.items():
            for chosen in partition(len(layers), self.groups):
                parts = [part for i in chosen for part in list(layers.values())[i]]
                last = f"-{list(layers)[chosen[-1]]}" if len(chosen) > 1 else ""
                scheme = dataclasses.replace(self, owners=_owners(parts)) if self.tie else self
                name = f"{parts[0].name}{last}.stream{width}"
                yield Draft(name, scheme, tuple(part.member for part in parts))

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        rank = self.resolve_base_rank(self._stacked(shapes))
        v = Ref("V", (rank, shapes[0][1]))
        factors: dict[str, Shape] = {"V": v.of}
        weights: list[Expr] = []
        for j, (owner, (rows, columns)) in enumerate(
            zip(self._places(len(shapes)), shapes, strict=True)
        ):
            c = Ref(f"C{owner}", (rows, rank))
            factors[c.name] = c.of
            if owner == j:
                weights.append(MatMul(c, v))
                continue
            s, t = Ref(f"s{j}", (rows, 1)), Ref(f"t{j}", (1, columns))
            factors |= {s.name: s.of, t.name: t.of}
            weights.append(Mul(MatMul(Mul(c, s), v), t))
        return Layout(factors, tuple(weights))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        wholes, scales = self._wholes(matrices)
        stacked = torch.cat(list(wholes.values()))
        c, v = truncate(stacked, self.resolve_base_rank((stacked.shape[0], stacked.shape[1])))
        parts = torch.split(c, [len(w) for w in wholes.values()])
        return {"V": v, **{f"C{j}": p for j, p in zip(wholes, parts, strict=True)}, **scales}

    def base_shape(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        return self._stacked(shapes)

    def base_gains(self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]) -> Tensor:
        wholes, _ = self._wholes(matrices)
        right = mean_metric(metrics).right
        parts = [KfacMetric(metrics[j].scaled_left(), right).whiten(w) for j, w in wholes.items()]
        values = spectrum(torch.cat(parts)).square()
        costs = sum(m.cost(w) for w, m in zip(matrices, metrics, strict=True))
        return values * (costs / float(values.sum().clamp(min=1e-300)))

    def _parts(self, block: Block) -> Iterator[_Part]:
        stem, name = block.stack, block.name
        if self.join:  # blocks.3.attn and blocks.3.mlp are both of blocks.3
            start, star, part = stem.partition("*")
            stem, name = start + star, name.removesuffix(part)
        own = matrices_of(block)
        for role, slot in (own if self.tie else fuse(own)).items():
            # What is not on a stream (a 3x3 convolution) gets a group of its own: plain low rank.
            label = "" if role in _READS | _WRITES else f".{role}"
            member = Member(slot, flip=role in _WRITES)
            yield _Part(stem + label, name + label, block.name, role, member)

    def _places(self, count: int) -> tuple[int, ...]:
        return self.owners or tuple(range(count))

    def _stacked(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Shape of all coefficients' matrices below each other."""
        rows = sum(shapes[j][0] for j in set(self._places(len(shapes))))
        return rows, shapes[0][1]

    def _wholes(
        self, matrices: Sequence[Tensor]
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:  # fmt: skip
        """The matrix of each set of coefficients, and the scales of those that share it."""
        wholes: dict[int, Tensor] = {}
        scales: dict[str, Tensor] = {}
        places = self._places(len(matrices))
        for owner in sorted(set(places)):
            mine = [j for j, place in enumerate(places) if place == owner]
            wholes[owner], found = shared_with_scales([matrices[j] for j in mine])
            for j, (s, t) in zip(mine[1:], found[1:], strict=True):
                scales |= {f"s{j}": s, f"t{j}": t}
        return wholes, scales


@dataclass(frozen=True)
class _Part:
    """A member of a group to be: its stack, the group's name, its block and role."""

    stack: str
    name: str
    block: str
    role: str
    member: Member


def _owners(parts: Sequence[_Part]) -> tuple[int, ...]:
    """For each matrix, the place of the one whose coefficients it uses: its own, or a pair's."""
    at = {(p.block, p.role): j for j, p in enumerate(parts)}
    return tuple(
        at[p.block, reader]
        if (reader := _PAIR.get(p.role, p.role)) != p.role
        and (p.block, reader) in at
        and parts[at[p.block, reader]].member.shape == p.member.shape
        else j
        for j, p in enumerate(parts)
    )


SCHEME = Basis
