"""Tied: the second matrix of a pair is the transpose of the first.

After a nonlinearity, `F(W x)` is not in the column space of W, so `W^T` can serve as the second
map (Koyun and Toreyin, https://arxiv.org/abs/2401.16438):

    feed-forward   W^T F(W x + b1) + b2
    attention      kv-qo: W_v = W_k^T and W_o = W_q^T;   vo-qk: W_o = W_v^T and W_k = W_q
    bottleneck     conv3 = conv1^T, everything between them untouched

Beyond the paper, `M_j = diag(s_j) W diag(t_j) + B_j A_j` for every matrix of a group but the
first: `scale` stores s and t (a thousandth of the size), `rank` goes from pure tying to the
original, and `base_rank` stores W itself as a product of two factors (W_1 = C V and
W_2 = V^T C^T, both scaled): a tie over low rank, for small budgets. In a bottleneck the
BatchNorms hold the scales, so none are stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.core.expr import Expr, MatMul, Mul, Ref, Shape, Slice
from tiedconv.core.plan import Block
from tiedconv.errors import SchemeError
from tiedconv.numerics.linalg import energy, shared_with_scales, truncate, weighted_base
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes import _align
from tiedconv.schemes._base import Draft, FactoredBase, Layout, Ranked, with_residual
from tiedconv.schemes._pairs import PAIRINGS, Stage, bottleneck_groups, pair_groups


@dataclass(frozen=True)
class Tied(FactoredBase, Ranked):
    """One W for a pair (or for the pairs of several blocks), transposed for one of the two.

    Args:
        pairing: of an attention's matrices: `kv-qo` (the paper's) or `vo-qk`.
        scale: store row and column scales, signs too, for all matrices of a group but the first.
        rank: of the residual of all matrices but the first: a number, or a fraction of the matrix.
        base_rank: rank of W itself: a number, or a fraction of its parameters (below 1); 0 stores
            it as it is.
        groups: blocks of a stack that share one W: `each` (none), `adjacent:N`, `all`.
        first: a ResNet stage's first block, whose conv1 reads another width: `keep` it, take
            conv1 as a `slice` of W, or tie only its conv3 (`expand`).
        spatial: with `groups`, share the 3x3 convolutions too.
        match: before the fit, rotate heads, order units and scale rows so that pairs agree best.
    """

    name: ClassVar[str] = "tied"
    base_name: ClassVar[str] = "W"
    pattern: ClassVar[str] = "pairs (m, d) and (d, m): feed-forward, attention, bottleneck"
    smaller_options: ClassVar = (
        {"groups": "all"},
        {"groups": "all", "first": "expand"},
        {"groups": "all", "first": "expand", "spatial": True},
    )

    pairing: str = "kv-qo"
    scale: bool = True
    groups: str = "each"
    first: str = "keep"
    spatial: bool = False
    match: bool = True

    def __post_init__(self) -> None:
        for option, known in (("pairing", PAIRINGS), ("first", ("keep", "slice", "expand"))):
            if getattr(self, option) not in known:
                raise SchemeError(
                    f"Invalid {option}={getattr(self, option)!r} of scheme tied",
                    hint=f"Use one of: {', '.join(known)}",
                    code="unknown-choice",
                )

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        for name, members in pair_groups(blocks, self.groups, self.pairing):
            yield Draft(name, self, members)
        unscaled = dataclasses.replace(self, scale=False)
        for stage in self._stages(blocks):
            for name, parts in stage.members(self.spatial):
                yield Draft(name, unscaled, tuple(parts))

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        whole = (shapes[0][0], max(columns for _, columns in shapes))
        factors: dict[str, Shape] = {}
        w = self.store(factors, whole)
        weights: list[Expr] = []
        for j, (rank, shape) in enumerate(zip(self.ranks(shapes), shapes, strict=True)):
            part = w if shape[1] == whole[1] else _first_columns(w, shape[1])
            if self.scale and j:
                s, t = Ref(f"s{j}", (shape[0], 1)), Ref(f"t{j}", (1, shape[1]))
                factors |= {s.name: s.of, t.name: t.of}
                part = Mul(Mul(part, s), t)
            weights.append(with_residual(factors, part, j, rank, shape) if rank else part)
        return Layout(factors, tuple(weights))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        ranks = self.ranks([(m.shape[0], m.shape[1]) for m in matrices])
        w, scales = self._scales(matrices)
        factors: dict[str, Tensor] = {}
        left = list(matrices)
        if any(ranks):
            # A residual measured from the first matrix itself: at full rank it is exact, and
            # what it leaves is split evenly by the mean below.
            for j, residual in enumerate(self.residuals(matrices)):
                if residual is not None and ranks[j]:
                    b, a = truncate(residual, ranks[j])
                    factors |= {f"B{j}": b, f"A{j}": a}
                    left[j] = matrices[j] - b @ a
            weights = [1.0 / max(energy(m), 1e-30) for m in matrices]
            w = weighted_base(left, scales, weights if self.scale else [1.0] * len(left))
        for j, (s, t) in enumerate(scales):
            if self.scale and j:
                factors |= {f"s{j}": s, f"t{j}": t}
        return {**self.stored(w), **factors}

    def residuals(self, matrices: Sequence[Tensor]) -> Iterator[Tensor | None]:
        _, scales = self._scales(matrices)
        first = matrices[0]
        yield None
        for m, (s, t) in zip(matrices[1:], scales[1:], strict=True):
            yield m - s * first[:, : m.shape[1]] * t

    def align(self, blocks: Sequence[Block], editor: WeightEditor) -> None:
        super().align(blocks, editor)
        if not self.match:
            return
        whole = [b for b in blocks if _align.is_whole(b)]
        if self.groups != "each":
            _align.match_layers([b for b in whole if b.kind == "ffn"], self.groups, editor)
        for block in whole:
            if block.kind == "attention" and self.pairing == "kv-qo" and self.groups == "each":
                _align.tie_attention(block, editor)
            elif block.kind == "ffn":
                _align.balance_hidden(block, editor)
        for stage in self._stages(whole):
            if stage.tied:
                _align.tie_bottlenecks(stage.tied, editor)

    def rank_slots(self, count: int) -> list[bool]:
        return [j > 0 for j in range(count)]

    def _scales(self, matrices: Sequence[Tensor]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        if self.scale:
            return shared_with_scales(matrices)
        ones = [(m.new_ones(m.shape[0], 1), m.new_ones(1, m.shape[1])) for m in matrices]
        return weighted_base(matrices, ones, [1.0] * len(ones)), ones

    def _stages(self, blocks: Sequence[Block]) -> Iterator[Stage]:
        return bottleneck_groups(blocks, self.groups, self.first)


def _first_columns(w: Expr, count: int) -> Expr:
    """The first columns of W; of a product, those of its second factor alone."""
    if isinstance(w, MatMul):
        return MatMul(w.a, Slice(w.b, 1, 0, count))
    return Slice(w, 1, 0, count)


SCHEME = Tied
