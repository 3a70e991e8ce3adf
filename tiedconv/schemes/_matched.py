"""Schemes that put the layers of a stack in the same order before they share a base."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tiedconv.core.plan import Block
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes._align import match_layers
from tiedconv.schemes._base import Scheme


class LayersMatched(Scheme):
    """A scheme with the options `match` and `groups`.

    It is no dataclass, so that each scheme declares the two where they stand in its own order.
    """

    match: bool
    groups: str

    @property
    def alignment(self) -> Hashable:
        return ("layers" if self.match else "fold", self.fold, self.groups if self.match else "")

    def align(self, blocks: Sequence[Block], editor: WeightEditor) -> None:
        super().align(blocks, editor)
        if self.match:
            match_layers(blocks, self.groups, editor)
