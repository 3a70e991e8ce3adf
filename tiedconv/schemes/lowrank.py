"""Baseline: each matrix as a product of two factors, by its truncated SVD.

    W = B A,  B (out, rank),  A (rank, in)

Eckart and Young, "The approximation of one matrix by another of lower rank", 1936
(https://doi.org/10.1007/BF02288367).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block
from tiedconv.numerics.linalg import truncate
from tiedconv.schemes._base import Draft, Layout, Ranked, with_residual
from tiedconv.schemes._stacks import stacks


@dataclass(frozen=True)
class LowRank(Ranked):
    """Truncated SVD of each matrix.

    Args:
        rank: a number, a fraction of a matrix's parameters (below 1), or one for each matrix.
        k: multipliers of `rank` (one, as a group is one matrix).
        fused: take a fused qkv as one matrix.
    """

    name: ClassVar[str] = "lowrank"
    pattern: ClassVar[str] = "linear layers and convolutions in known blocks or numbered stacks"
    min_rank: ClassVar[int] = 1
    smaller_options: ClassVar = ({"rank": 1},)

    rank: int | float | tuple[int, ...] = 0.5
    fused: bool = True

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        for name, members in stacks(blocks, "each", fused=self.fused):
            yield Draft(name, self, members)

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        factors: dict[str, Shape] = {}
        rank = self._rank(shapes[0])
        return Layout(factors, (with_residual(factors, None, 0, rank, shapes[0]),))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        b, a = truncate(matrices[0], self._rank((matrices[0].shape[0], matrices[0].shape[1])))
        return {"B0": b, "A0": a}

    def residuals(self, matrices: Sequence[Tensor]) -> list[Tensor | None]:
        return list(matrices)

    def _rank(self, shape: tuple[int, int]) -> int:
        return max(1, self.ranks([shape])[0])


SCHEME = LowRank
