"""LORS, static: stacked layers share a base and keep private low-rank residuals.

    W_i = base + B_i A_i            (Li et al., arXiv 2403.04303, equation 4)

A sum of K rank-r terms, as the paper writes it, is one term of rank K r: `k` lists K for each
layer. Convolutions take part as matrices of shape `(out, in * kh * kw)`. Biases and norms stay
private. From pretrained weights, the base is their mean and the residuals are the truncated SVD
of what it leaves, improved by turns; `match` first puts each layer's hidden units, heads and
head bases in the order that agrees best with the layers before it, which changes no output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.expr import Ref, Shape
from tiedconv.gauge import Workbench
from tiedconv.linalg import base_and_residuals
from tiedconv.plan import Block
from tiedconv.schemes._align import match_layers
from tiedconv.schemes._base import Draft, Layout, Ranked, stacks, with_residual


@dataclass(frozen=True)
class Lors(Ranked):
    """One base for each group of a stack, a residual for each layer.

    Args:
        rank: of the residuals: a number, a share of a layer's parameters (below 1), or a list.
        k: multipliers of `rank`, one for each layer of the group (the paper's K list).
        groups: which layers share a base: `all`, `adjacent:N` or `cycle:N`.
        fused: take a fused qkv as one matrix.
        match: align layers before the fit.
    """

    name: ClassVar[str] = "lors"
    looks_for: ClassVar[str] = "stacks of at least two layers of one shape"
    further: ClassVar = ({"rank": 0},)

    rank: int | float | tuple[int, ...] = 0.2
    groups: str = "all"
    fused: bool = True
    match: bool = True

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        for name, members in stacks(blocks, self.groups, fused=self.fused):
            if len(members) > 1:
                yield Draft(name, self, members)

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        base = Ref("base", shapes[0])
        factors: dict[str, Shape] = {"base": shapes[0]}
        weights = [
            with_residual(factors, base, j, rank, shape)
            for j, (rank, shape) in enumerate(zip(self.ranks(shapes), shapes, strict=True))
        ]
        return Layout(factors, tuple(weights))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        ranks = self.ranks([(m.shape[0], m.shape[1]) for m in matrices])
        base, pairs = base_and_residuals(matrices, ranks)
        factors = {"base": base}
        for j, (b, a) in enumerate(pairs):
            if ranks[j]:
                factors |= {f"B{j}": b, f"A{j}": a}
        return factors

    def residuals(self, matrices: Sequence[Tensor]) -> list[Tensor | None]:
        base, _ = base_and_residuals(matrices, [0] * len(matrices))
        return [m - base for m in matrices]

    def align(self, blocks: Sequence[Block], bench: Workbench) -> None:
        super().align(blocks, bench)
        if self.match:
            match_layers(blocks, self.groups, bench)


SCHEME = Lors
