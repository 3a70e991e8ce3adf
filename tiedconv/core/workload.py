"""What one forward pass takes, weight by weight: plain numbers, found once.

In one of two units: multiply-adds, which are counted, or nanoseconds on one machine, which are
measured (`Piece.times`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Times:
    """Nanoseconds of a layer: as it is, and with factors of any rank.

    Args:
        whole: with the weight itself.
        fixed, each: with factors: `fixed`, and `each` for every multiply-add of a row of features.
        limit: factors are applied up to this share of the weight's multiply-adds; None where
            whatever takes less time is run.
        cut: what a layer with a part of the rows or columns saves, over that part of `whole`.
    """

    whole: float
    fixed: float
    each: float
    limit: float | None = None
    cut: float = 1.0

    def times(self, count: float) -> Times:
        """Those of a part of the layer, or of several runs."""
        return dataclasses.replace(
            self, whole=self.whole * count, fixed=self.fixed * count, each=self.each * count
        )


@dataclass(frozen=True)
class Piece:
    """Rows of a weight, and the rows of features that they are applied to.

    Args:
        start, stop: of the first dimension of the tensor as it is stored.
        rows: of features: tokens, or positions of a convolution's output, of all calls.
        times: of these rows, where times were measured.
        calls: products that they are applied in, as where layers share a weight.
    """

    start: int
    stop: int
    rows: int
    times: Times | None = None
    calls: int = 1

    def within(self, start: int, stop: int) -> Piece | None:
        """The part of it in some rows, counted from the first of these; None if there is none."""
        first, last = max(self.start, start), min(self.stop, stop)
        if first >= last:
            return None
        share = (last - first) / (self.stop - self.start)
        # Each multiply-add of a part takes as long: there are fewer.
        times = self.times and dataclasses.replace(self.times.times(share), each=self.times.each)
        return Piece(first - start, last - start, self.rows, times, self.calls)


@dataclass(frozen=True)
class Use:
    """How one forward pass uses a weight.

    Args:
        work: of all products with it, in the unit of the workload.
        pieces: where layers that can apply factors use it: all of its rows, or, as in a
            cross-attention, some of them for the queries and the rest for keys and values.
        heads: of the last matrix of an attention the work of its products of queries, keys and
            values, which falls with its heads; 0 where it may not.
    """

    work: float
    pieces: tuple[Piece, ...] = ()
    heads: float = 0

    def within(self, start: int, stop: int) -> list[Piece]:
        """The pieces of some of its rows, counted from the first of these."""
        return [part for p in self.pieces if (part := p.within(start, stop)) is not None]


@dataclass(frozen=True)
class Workload:
    """What one forward pass of the original takes.

    Args:
        total: of everything, products of attention included, in the unit.
        uses: of each weight by its first name; a weight that is never run is missing.
        inputs: shapes of the input tensors, one example.
        unit: `macs` or `ns`.
    """

    total: int
    uses: Mapping[str, Use] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
    unit: str = "macs"
