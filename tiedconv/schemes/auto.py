"""Auto: the best scheme for each block of the model, at a budget.

It has no layout of its own. Its candidates are the schemes whose size a budget can choose, and
`planning/scheme_search` takes for each block, or for a stack as a whole, the one that leaves the
least cost at one common Lagrange multiplier (cost per parameter). Plain low rank is among them,
and so is keeping a block as it is. Without a budget it halves the model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes._base import Draft, Layout, Scheme
from tiedconv.schemes.basis import Basis
from tiedconv.schemes.lors import Lors
from tiedconv.schemes.lowrank import LowRank
from tiedconv.schemes.narrow import Narrow
from tiedconv.schemes.tied import Tied


@dataclass(frozen=True)
class Auto(Scheme):
    """For each block, the candidate that leaves the least cost.

    Args:
        share: consider schemes that span blocks too (a base or a basis for a whole stack).
    """

    name: ClassVar[str] = "auto"
    pattern: ClassVar[str] = "what lowrank, basis, tied, narrow or lors convert"

    share: bool = True

    def candidates(self) -> tuple[Scheme, ...]:
        alone = (
            LowRank(),
            LowRank(fused=False),
            Basis(),
            Basis(tie=True),
            Tied(base_rank=0.5),
            Narrow(),
        )
        spanning = (Basis(groups="all"), Basis(groups="adjacent:2"))
        return alone + spanning if self.share else alone

    def alternatives(self) -> tuple[Scheme, ...]:
        # These fit better than their curves predict, as base and residuals compensate each other;
        # and a base for a stack needs its own alignment. Each is tried for the whole model even
        # where its curve predicts less than the mixture, so that auto is never worse than it.
        alone = (LowRank(), Basis(), Tied(base_rank=0.5), Tied())
        return (*alone, Lors(base_rank=0.5), Lors()) if self.share else alone

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        return self.candidates()[0].drafts(blocks)

    def align(self, blocks: Sequence[Block], editor: WeightEditor) -> None:
        super().align(blocks, editor)
        # The alignment for pairs; low rank and bases do not depend on a head's basis.
        Tied().align(blocks, editor)

    def arrange(
        self, blocks: Sequence[Block], editor: WeightEditor, metrics: Mapping[str, KfacMetric]
    ) -> Mapping[str, KfacMetric]:
        # The others do not depend on the order of hidden units.
        return Narrow().arrange(blocks, editor, metrics)

    @property
    def alignment(self) -> Hashable:
        return Tied(fold=self.fold).alignment

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        raise NotImplementedError("auto's groups have their candidates' schemes")

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError("auto's groups have their candidates' schemes")


SCHEME = Auto
