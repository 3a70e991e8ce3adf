"""Narrow: fewer hidden units, those that stay fitted to the outputs of all.

    W_up' = the rows of W_up of the units S that stay
    W_down' = W_down E[h h_S^T] E[h_S h_S^T]^-1

with h the hidden units (after the activation): representation recovery by ridge regression, as in
CORP (arXiv 2602.05243). Which units stay is chosen in the metric of the outputs, by backward
elimination (`numerics.unit_selection`); they are put first, which permutes hidden units and so is
done only where that preserves the function. The weights are the stored ones, padded with zeros, so
a model can be fine-tuned and saved as any other, and `narrow_layers` makes its layers narrow.

`core.units` says which matrices write and read units. In a bottleneck there are two layers of
them, those after conv1 and those after conv2; the units of an attention are its heads, and h is
what its last matrix reads. Where heads of queries share one of keys and values, a unit is that one
with all its queries. Norms of q and k, and rotary positions, are the same for all heads: they stay.

Without images nothing is known of h: the units with the largest weights stay, as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.core.expr import Expr, Ref, Shape
from tiedconv.core.pad import padded
from tiedconv.core.plan import Block, Member, Slot
from tiedconv.core.units import (
    PERMUTES,
    Units,
    count_of,
    rows_of_units,
    units_among,
    units_of,
)
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.symmetries import WeightEditor, permute_units, rows_of
from tiedconv.numerics.unit_selection import decreasing, order_by_losses
from tiedconv.schemes._base import Draft, Layout, RankOption, Scheme

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Narrow(Scheme):
    """Hidden units removed, the matrix that reads the others fitted in closed form.

    Args:
        width: hidden units that stay: a number, or a fraction (below 1) of them.
        step: the width is a multiple of it, or whole: processors like multiples of 8. Of an
            attention it is a head, whatever is given.
        roles: of the matrices of a group, joined by "-"; a group has its own.
    """

    name: ClassVar[str] = "narrow"
    pattern: ClassVar[str] = "feed-forwards, inverted bottlenecks, bottlenecks, heads of attentions"
    min_rank: ClassVar[int] = 1
    smaller_options: ClassVar = ({"width": 0.25},)
    has_shared_sides: ClassVar = True

    width: int | float | tuple[int, ...] = 0.5
    step: int = 8
    roles: str = ""

    def __post_init__(self) -> None:
        widths = self.width if isinstance(self.width, tuple) else (self.width,)
        if self.step < 1 or any(not _is_width(w) for w in widths):
            raise SchemeError(
                f"Invalid width={self.width}, step={self.step} of scheme narrow",
                hint="Use a whole number of hidden units, or a fraction below 1; a step from 1",
                code="invalid-width",
            )

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        for block in blocks:
            block = _in_order(block)
            units = _removable(block)
            sizes = {u.name: _rows(block, u) for u in units}
            heads = next((count_of(block, u) for u in units if u.name == "heads"), None)
            step = sizes["heads"] // heads if heads else self.step
            if not any(rows > step for rows in sizes.values()):
                continue
            roles = "-".join(block.slots)
            scheme = dataclasses.replace(self, step=step, roles=roles)
            yield Draft(f"{block.name}.{roles}", scheme, tuple(map(Member, block.slots.values())))

    def layout(self, shapes: Shapes) -> Layout:
        factors: dict[str, Shape] = {}
        weights: list[Expr] = []
        for i, ((rows, columns), kept) in enumerate(zip(shapes, self._kept(shapes), strict=True)):
            stored = Ref(f"W{i}", kept)
            factors[stored.name] = kept
            weights.append(padded(padded(stored, 1, columns), 0, rows))
        return Layout(factors, tuple(weights))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        return self.fit_measured(matrices, [IDENTITY] * len(matrices))

    def fit_measured(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> dict[str, Tensor]:
        kept = self._kept([(m.shape[0], m.shape[1]) for m in matrices])
        return {
            f"W{i}": metrics[i].onto_first_columns(matrix, kept[i][1])[: kept[i][0]]
            for i, matrix in enumerate(matrices)
        }

    def measures(self, shapes: Shapes, metrics: Sequence[KfacMetric]) -> list[KfacMetric]:
        # Nothing reads a unit that was removed, so what becomes of its row costs nothing.
        return [
            metric.of_first_rows(kept[0]) if metric.measured else metric
            for metric, kept in zip(metrics, self._kept(shapes), strict=True)
        ]

    def arrange(
        self, blocks: Sequence[Block], editor: WeightEditor, metrics: Mapping[str, KfacMetric]
    ) -> Mapping[str, KfacMetric]:
        found = dict(metrics)
        for block in map(_in_order, blocks):
            for units in _removable(block):
                if not editor.allows(block, PERMUTES[units.name]):
                    continue
                slots = [*block.slots.values()]
                writers, readers = ([slots[i] for i in at] for at in (units.writers, units.readers))
                order = _order(writers, readers, count_of(block, units) or 1, editor, found)
                permute_units(editor, block, units.name, order)
                for slot in {*writers, *readers}:
                    if slot.tensor in found:
                        rows = _moved_rows(slot, order) if slot in writers else None
                        columns = rows_of(order, slot.columns) if slot in readers else None
                        found[slot.tensor] = found[slot.tensor].reordered(rows, columns)
        return found

    def rank_options(self, shapes: Shapes) -> list[RankOption | None]:
        found: list[RankOption | None] = [None] * (len(shapes) + 1)
        for units in self._units(len(shapes)):
            count = _count(shapes, units)
            each = sum(shapes[i][1] * (shapes[i][0] // count) for i in units.writers)
            each += sum(shapes[i][0] * shapes[i][1] // count for i in units.readers)
            steps = -(-count // self.step)
            found[units.readers[-1]] = RankOption(
                min(self.step, count) * each, self.min_rank, steps, steps
            )
        return found

    def rank_slots(self, count: int) -> list[bool]:
        takes = {units.readers[-1] for units in self._units(count)}
        return [i in takes for i in range(count)]

    def gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> list[Tensor | None]:  # fmt: skip
        found: list[Tensor | None] = [None] * (len(matrices) + 1)
        for units in self._units(len(matrices)):
            count = _count([(m.shape[0], m.shape[1]) for m in matrices], units)
            # In the Cholesky basis a column is what its unit adds to those before it.
            loss = torch.zeros(count, dtype=torch.float64)
            for i in units.readers:
                loss += metrics[i].whiten(matrices[i]).square().sum(0).reshape(count, -1).sum(1)
            if not any(metrics[i].measured for i in units.readers):
                for i in units.writers:
                    loss += matrices[i].square().sum(1).reshape(count, -1).sum(1)
            found[units.readers[-1]] = decreasing(0.5 * self._by_steps(loss))
        return found

    def with_residual_ranks(self, ranks: Sequence[int]) -> Scheme:
        units = self._units(len(ranks))
        return dataclasses.replace(
            self, width=tuple(ranks[u.readers[-1]] * self.step for u in units)
        )

    def _units(self, count: int) -> list[Units]:
        """The units of so many matrices; without roles, each reads those of the one before it."""
        if self.roles:
            return units_among(self.roles.split("-"))
        return [Units(str(i), (i,), (i + 1,)) for i in range(count - 1)]

    def _by_steps(self, values: Tensor) -> Tensor:
        """Sums over the units of each step."""
        steps = torch.arange(len(values)) // self.step
        return values.new_zeros(int(steps[-1]) + 1).index_add(0, steps, values)

    def _kept(self, shapes: Shapes) -> list[tuple[int, int]]:
        """The shape of what is stored of each matrix."""
        layers = self._units(len(shapes))
        widths = self.width if isinstance(self.width, tuple) else (self.width,) * len(layers)
        if len(widths) != len(layers):
            raise SchemeError(
                f"width lists {len(widths)} numbers, but a group has {len(layers)} hidden layers",
                hint="Give one number for each, or one for all",
                code="wrong-rank-count",
            )
        rows, columns = ([shape[side] for shape in shapes] for side in (0, 1))
        for units, width in zip(layers, widths, strict=True):
            count = _count(shapes, units)
            left = self._resolve(width, count)
            for i in units.writers:
                rows[i] = left * (rows[i] // count)
            for i in units.readers:
                columns[i] = left * (columns[i] // count)
        return list(zip(rows, columns, strict=True))

    def _resolve(self, width: int | float, units: int) -> int:
        steps = width * units / self.step if isinstance(width, float) else width / self.step
        return min(units, self.step * max(1, math.floor(steps + 0.5)))


def _is_width(width: int | float) -> bool:
    return 0 < width < 1 if isinstance(width, float) else width > 0


_ORDER: Mapping[str, tuple[str, ...]] = {
    "ffn": ("gate", "up", "depthwise", "reduce", "expand", "down"),
    "bottleneck": ("conv1", "conv2", "conv3"),
    "attention": ("q", "k", "v", "o"),
}
"""The matrices of each kind of block, in the order of a group."""


def _in_order(block: Block) -> Block:
    """The block with its matrices in the order of a group."""
    slots = {role: block.slots[role] for role in _ORDER.get(block.kind, ()) if role in block.slots}
    return dataclasses.replace(block, slots=slots)


def _removable(block: Block) -> list[Units]:
    """The units of a block; none where one is not known to be apart from the others."""
    found = units_of(block) if block.permutable else []
    # As those of groups of a convolution, whose sizes do not agree.
    return found if len(found) == len(units_among([*block.slots])) else []


def _rows(block: Block, units: Units) -> int:
    """Rows of the units, see `_count`."""
    return _count([slot.matrix_shape for slot in block.slots.values()], units)


def _count(shapes: Shapes, units: Units) -> int:
    """Rows of some units: of a head of keys and values where several of queries share it."""
    return rows_of_units(shapes[i][0] for i in units.writers)


def _moved_rows(slot: Slot, order: Tensor) -> Tensor:
    """The order of all rows of a tensor, of which those of a slot are put into an order."""
    rows = torch.arange(Slot.whole(slot.tensor, slot.shape, slot.transposed).rows)
    rows[slot.start : slot.stop] = slot.start + rows_of(order, slot.rows)
    return rows


def _order(
    writers: Sequence[Slot],
    readers: Sequence[Slot],
    units: int,
    editor: WeightEditor,
    metrics: Mapping[str, KfacMetric],
) -> Tensor:
    """The units, the most important first."""
    if all(slot.tensor in metrics for slot in readers):
        return order_by_losses(
            [(editor.matrix(slot), metrics[slot.tensor]) for slot in readers], units
        )
    sizes = torch.zeros(units, dtype=torch.float64)
    for slot in writers:
        sizes += editor.matrix(slot).double().square().reshape(units, -1).sum(1)
    for slot in readers:
        sizes += editor.matrix(slot).double().square().sum(0).reshape(units, -1).sum(1)
    return sizes.argsort(descending=True, stable=True)


SCHEME = Narrow
