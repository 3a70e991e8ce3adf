"""Auto: the best scheme for each part of the model, at a budget.

It has no form of its own. Its candidates are the forms of this folder that a budget can size, and
`tiedconv.search` takes for each block, or for a stack as a whole, the one that leaves the least
cost at the same price of a parameter. Plain low rank is among them, and so is leaving a block as
it is. Without a budget it halves the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes._base import Draft, Layout, Scheme
from tiedconv.schemes.basis import Basis
from tiedconv.schemes.lors import Lors
from tiedconv.schemes.lowrank import LowRank
from tiedconv.schemes.tied import Tied


@dataclass(frozen=True)
class Auto(Scheme):
    """For each part, the candidate that leaves the least cost.

    Args:
        share: consider forms that span blocks too (a base or a basis for a whole stack).
    """

    name: ClassVar[str] = "auto"
    pattern: ClassVar[str] = "whatever lowrank, basis, tied or lors look for"

    share: bool = True

    def candidates(self) -> tuple[Scheme, ...]:
        alone = (LowRank(), LowRank(fused=False), Basis(), Basis(tie=True), Tied(core=0.5))
        spanning = (Basis(groups="all"), Basis(groups="adjacent:2"))
        return alone + spanning if self.share else alone

    def alternatives(self) -> tuple[Scheme, ...]:
        # These fit better than their curves say, as a shared part and a private part make up for
        # each other; and a base for a stack wants its layers aligned, in a way of its own.
        # A scheme for the whole model is tried even where its curve promises less than a mixture:
        # so nothing is behind the best of them.
        alone = (LowRank(), Basis(), Tied(core=0.5), Tied())
        return (*alone, Lors(core=0.5), Lors()) if self.share else alone

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        return self.candidates()[0].drafts(blocks)

    def align(self, blocks: Sequence[Block], editor: WeightEditor) -> None:
        super().align(blocks, editor)
        # Moves for pairs: low rank and bases are the same in every basis of a head.
        Tied().align(blocks, editor)

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        raise NotImplementedError("auto's groups have their candidates' schemes")

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError("auto's groups have their candidates' schemes")


SCHEME = Auto
