"""Narrow: fewer hidden units, those that stay fitted to the outputs of all.

    W_up' = the rows of W_up of the units S that stay
    W_down' = W_down E[h h_S^T] E[h_S h_S^T]^-1

with h the hidden units (after the activation): representation recovery by ridge regression, as in
CORP (arXiv 2602.05243). Which units stay is chosen in the metric of the outputs, by backward
elimination (`numerics.unit_selection`); they are put first, which permutes hidden units and so is
done only where that preserves the function. The weights are the stored ones, padded with zeros, so
a model can be fine-tuned and saved as any other, and `narrow_layers` makes its layers narrow.

Without images nothing is known of h: the units with the largest weights stay, as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.core.expr import Expr, Ref, Shape, padded
from tiedconv.core.plan import Block, Member
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.symmetries import WeightEditor, permute_hidden
from tiedconv.numerics.unit_selection import decreasing, order_by_loss
from tiedconv.schemes._base import Draft, Layout, RankOption, Scheme

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Narrow(Scheme):
    """Hidden units removed, the matrix that reads the others fitted in closed form.

    Args:
        width: hidden units that stay: a number, or a fraction (below 1) of them.
        step: the width is a multiple of it, or whole: processors like multiples of 8.
    """

    name: ClassVar[str] = "narrow"
    pattern: ClassVar[str] = "feed-forwards of two matrices with an activation alone between them"
    min_rank: ClassVar[int] = 1
    smaller_options: ClassVar = ({"width": 0.25},)

    width: int | float | tuple[int, ...] = 0.5
    step: int = 8

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
            chain = _chain(block)
            if chain and block.slots[chain[0]].rows > self.step:
                yield Draft(f"{block.name}.{'-'.join(chain)}", self, _members(block, chain))

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
        for block in blocks:
            if _chain(block) and editor.allows(block, "permute hidden units"):
                up, down = block.slots["up"], block.slots["down"]
                order = _order(editor.matrix(up), editor.matrix(down), found.get(down.tensor))
                permute_hidden(editor, block, order)
                if up.tensor in found:
                    found[up.tensor] = found[up.tensor].reordered(rows=order)
                if down.tensor in found:
                    columns = _columns(order, down.columns // up.rows)
                    found[down.tensor] = found[down.tensor].reordered(columns=columns)
        return found

    def rank_options(self, shapes: Shapes) -> list[RankOption | None]:
        found: list[RankOption | None] = [None]
        for (units, columns), (rows, inputs) in itertools.pairwise(shapes):
            steps = -(-units // self.step)
            each = min(self.step, units) * (columns + rows * (inputs // units))
            found.append(RankOption(each, self.min_rank, steps, steps))
        return [*found, None]

    def rank_slots(self, count: int) -> list[bool]:
        return [j > 0 for j in range(count)]

    def gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> list[Tensor | None]:  # fmt: skip
        found: list[Tensor | None] = [None]
        for i in range(1, len(matrices)):
            units = matrices[i - 1].shape[0]
            # In the Cholesky basis a column is what its unit adds to those before it.
            loss = metrics[i].whiten(matrices[i]).square().sum(0).reshape(units, -1).sum(1)
            if not metrics[i].measured:
                loss = loss + matrices[i - 1].square().sum(1)
            found.append(decreasing(0.5 * self._by_steps(loss.double())))
        return [*found, None]

    def with_residual_ranks(self, ranks: Sequence[int]) -> Scheme:
        return dataclasses.replace(self, width=tuple(r * self.step for r in ranks[1:]))

    def _by_steps(self, values: Tensor) -> Tensor:
        """Sums over the units of each step."""
        steps = torch.arange(len(values)) // self.step
        return values.new_zeros(int(steps[-1]) + 1).index_add(0, steps, values)

    def _kept(self, shapes: Shapes) -> list[tuple[int, int]]:
        """The shape of what is stored of each matrix."""
        units = [rows for rows, _ in shapes[:-1]]
        widths = self.width if isinstance(self.width, tuple) else (self.width,) * len(units)
        if len(widths) != len(units):
            raise SchemeError(
                f"width lists {len(widths)} numbers, but a group has {len(units)} hidden layers",
                hint="Give one number for each, or one for all",
                code="wrong-rank-count",
            )
        left = [self._resolve(w, n) for w, n in zip(widths, units, strict=True)]
        rows = [*left, shapes[-1][0]]
        sizes = [columns // n for (_, columns), n in zip(shapes[1:], units, strict=True)]
        columns = [shapes[0][1], *(n * size for n, size in zip(left, sizes, strict=True))]
        return list(zip(rows, columns, strict=True))

    def _resolve(self, width: int | float, units: int) -> int:
        steps = width * units / self.step if isinstance(width, float) else width / self.step
        return min(units, self.step * max(1, math.floor(steps + 0.5)))


def _is_width(width: int | float) -> bool:
    return 0 < width < 1 if isinstance(width, float) else width > 0


def _chain(block: Block) -> tuple[str, ...]:
    """The roles of the matrices between which hidden units lie, in order; none if unknown."""
    slots = block.slots
    if block.kind != "ffn" or not block.permutable or slots.keys() != {"up", "down"}:
        return ()
    is_chain = slots["down"].columns % slots["up"].rows == 0
    return ("up", "down") if is_chain and slots["up"].tensor != slots["down"].tensor else ()


def _members(block: Block, chain: Sequence[str]) -> tuple[Member, ...]:
    return tuple(Member(block.slots[role]) for role in chain)


def _order(up: Tensor, down: Tensor, metric: KfacMetric | None) -> Tensor:
    """The units, the most important first."""
    units = up.shape[0]
    if metric is not None:
        return order_by_loss(down, metric, down.shape[1] // units)
    sizes = down.square().sum(0).reshape(units, -1).sum(1) + up.square().sum(1)
    return sizes.argsort(descending=True, stable=True)


def _columns(order: Tensor, size: int) -> Tensor:
    """The columns of units in an order, `size` of each."""
    return (order.unsqueeze(1) * size + order.new_tensor(range(size))).flatten()


SCHEME = Narrow
