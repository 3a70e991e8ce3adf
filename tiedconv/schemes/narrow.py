"""Narrow: fewer hidden units, those that stay fitted to the outputs of all.

    W_up' = the rows of W_up of the units S that stay
    W_down' = W_down E[h h_S^T] E[h_S h_S^T]^-1

with h the hidden units (after the activation): representation recovery by ridge regression, as in
CORP (arXiv 2602.05243). Which units stay is chosen in the metric of the outputs, by backward
elimination (`numerics.unit_selection`); they are put first, which permutes hidden units and so is
done only where that preserves the function. The weights are the stored ones, padded with zeros, so
a model can be fine-tuned and saved as any other, and `narrow_layers` makes its layers narrow.
In a bottleneck there are two layers of hidden units, those after conv1 and those after conv2.

Without images nothing is known of h: the units with the largest weights stay, as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.core.expr import Expr, Ref, Shape
from tiedconv.core.pad import padded
from tiedconv.core.plan import Block, Member
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.symmetries import WeightEditor, permute_bottleneck, permute_hidden
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
    pattern: ClassVar[str] = "feed-forwards with an activation alone between, bottlenecks"
    min_rank: ClassVar[int] = 1
    smaller_options: ClassVar = ({"width": 0.25},)
    has_shared_sides: ClassVar = True

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
            roles = _roles(_hidden_of(block))
            if any(block.slots[role].rows > self.step for role in roles[:-1]):
                members = tuple(Member(block.slots[role]) for role in roles)
                yield Draft(f"{block.name}.{'-'.join(roles)}", self, members)

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
            for hidden in _hidden_of(block):
                if not editor.allows(block, hidden.symmetry):
                    continue
                one, two = block.slots[hidden.writer], block.slots[hidden.reader]
                order = _order(editor.matrix(one), editor.matrix(two), found.get(two.tensor))
                hidden.permute(editor, block, order)
                if one.tensor in found:
                    found[one.tensor] = found[one.tensor].reordered(rows=order)
                if two.tensor in found:
                    columns = _columns(order, two.columns // one.rows)
                    found[two.tensor] = found[two.tensor].reordered(columns=columns)
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


@dataclass(frozen=True)
class _Hidden:
    """Hidden units of a block: the roles of the matrices that write and read them.

    Args:
        writer, reader: roles.
        permute: puts them into another order, by the symmetry of the name `symmetry`.
    """

    writer: str
    reader: str
    symmetry: str
    permute: Callable[[WeightEditor, Block, Tensor], None]


_HIDDEN: Mapping[str, tuple[_Hidden, ...]] = {
    "ffn": (_Hidden("up", "down", "permute hidden units", permute_hidden),),
    "bottleneck": (
        _Hidden("conv1", "conv2", "permute units after conv1",
                lambda editor, block, order: permute_bottleneck(editor, block, order, None)),
        _Hidden("conv2", "conv3", "permute units after conv2",
                lambda editor, block, order: permute_bottleneck(editor, block, None, order)),
    ),
}  # fmt: skip


def _hidden_of(block: Block) -> tuple[_Hidden, ...]:
    """The hidden units of a block, layer after layer; none where they are not known to be apart."""
    found = _HIDDEN.get(block.kind, ())
    roles = _roles(found)
    slots = [block.slots[role] for role in roles if role in block.slots]
    # As a gate, which a unit has a row of too, or groups of a convolution.
    is_chain = set(roles) == block.slots.keys() and all(
        reader.columns == writer.rows * math.prod(reader.kernel)
        for writer, reader in itertools.pairwise(slots)
    )
    return found if is_chain and block.permutable else ()


def _roles(hidden: Sequence[_Hidden]) -> list[str]:
    return [*(h.writer for h in hidden), *(h.reader for h in hidden[-1:])]


def _order(writer: Tensor, reader: Tensor, metric: KfacMetric | None) -> Tensor:
    """The units, the most important first."""
    units = writer.shape[0]
    if metric is not None:
        return order_by_loss(reader, metric, reader.shape[1] // units)
    sizes = reader.square().sum(0).reshape(units, -1).sum(1) + writer.square().sum(1)
    return sizes.argsort(descending=True, stable=True)


def _columns(order: Tensor, size: int) -> Tensor:
    """The columns of units in an order, `size` of each."""
    return (order.unsqueeze(1) * size + order.new_tensor(range(size))).flatten()


SCHEME = Narrow
