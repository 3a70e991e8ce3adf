"""The multiply-adds of one forward pass, weight by weight: plain numbers, measured once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rows of a weight, and the rows of features that they are applied to.

    Args:
        start, stop: of the first dimension of the tensor as it is stored.
        rows: of features: tokens, or positions of a convolution's output.
    """

    start: int
    stop: int
    rows: int


@dataclass(frozen=True)
class Use:
    """How one forward pass uses a weight.

    Args:
        macs: multiply-adds of all products with it.
        pieces: where layers that can apply factors use it: all of its rows, or, as in a
            cross-attention, some of them for the queries and the rest for keys and values.
    """

    macs: int
    pieces: tuple[Piece, ...] = ()

    def within(self, start: int, stop: int) -> list[Piece]:
        """The pieces of some of its rows, counted from the first of these."""
        return [
            Piece(max(p.start, start) - start, min(p.stop, stop) - start, p.rows)
            for p in self.pieces
            if max(p.start, start) < min(p.stop, stop)
        ]


@dataclass(frozen=True)
class Workload:
    """What one forward pass of the original takes.

    Args:
        total: multiply-adds of all products, those of attention included.
        uses: of each weight by its first name; a weight that is never run is missing.
        inputs: shapes of the input tensors, one example.
    """

    total: int
    uses: Mapping[str, Use] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
