"""Rounding a matrix to integers with the least cost, by error feedback.

A matrix W becomes `diag(rows) Q diag(columns)` with Q whole numbers. Its entries are rounded one
after another, and what rounding has cost so far is made good by the entries that are still free: of
later columns through the second moment C of the inputs (GPTQ, https://arxiv.org/abs/2210.17323),
of later rows through that of the gradients, G (both sides: as for successive interference
cancellation). Each scale is chosen so that one unit of any entry costs the same, `step ** 2 / 24`
on average: then one step serves all matrices of a model, as their costs are in one unit, and the
number of bits each gets follows from its weights. Frequent integers take few bits in the file
(`io.deflated`), so no entry has to be clipped.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.numerics.linalg import cholesky

T = TypeVar("T")

LARGEST = 127
"""The codes have 8 bits at most."""

ROW_BLOCKS, ROWS = 8, 16
"""Rows are rounded in so many parts at most, each of so many rows at least; within one, no row
makes good what another cost."""

SHARE_OF_DIAGONAL, RIDGE = 0.7, 0.03
"""Of G and C, how much is not trusted: both are estimates, and large errors are not quadratic."""

ALIKE = 0.9
"""Of the inputs of a depthwise kernel, where they were not measured. Anything from 0.5 to 0.95 is
far better than rounding to nearest (EfficientNet-Lite0 in 8 bits: a quarter of the divergence)."""

SAMPLED_ROWS = 32
AT_ONCE = 64  # columns, between updates of all later ones
HALF_LEAST, HALF_MOST = 2.0**-14, 65504.0  # of float16, where it has all its digits


@dataclass(frozen=True)
class Rounded:
    """A matrix as integers.

    Args:
        values: whole numbers, int8 `(out, in)`.
        rows: scale of each row, `(out, 1)`.
        columns: factor of each column, `(1, in)`; None for none.
    """

    values: Tensor
    rows: Tensor
    columns: Tensor | None

    @property
    def matrix(self) -> Tensor:
        """What it stands for, `(out, in)`."""
        matrix = self.values.to(self.rows.dtype) * self.rows
        return matrix if self.columns is None else matrix * self.columns


@dataclass(frozen=True)
class _Side:
    """A second moment, prepared: later entries make good what earlier ones cost.

    Args:
        weights: of each entry's error, once later ones have made good what they can.
        feedback: unit upper triangular; row j moves later entries by the error of entry j.
    """

    weights: Tensor
    feedback: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> _Side:
        inverse = torch.cholesky_inverse(cholesky(moment))
        upper = cholesky(inverse).t()
        diagonal = upper.diagonal()
        return cls(1 / diagonal.square(), upper / diagonal.unsqueeze(1))


class Rounding:
    """The rounding of one matrix at any step.

    Args:
        matrix: `(out, in)`.
        metric: what its errors cost.
    """

    def __init__(self, matrix: Tensor, metric: KfacMetric) -> None:
        self._matrix = matrix.detach().double()
        self._metric = metric
        rows, columns = matrix.shape
        self._right = _kept(_sides, metric.right, lambda: self._side(metric.right, columns))
        # Neighbouring rows are alike (a head's): they go into different parts.
        count = max(1, min(ROW_BLOCKS, rows // ROWS)) if metric.left is not None else 1
        parts = [torch.arange(k, rows, count) for k in range(count)]
        self._order = torch.cat(parts)
        self._sizes = [len(part) for part in parts]
        self._left = self._moment(metric.left, rows, 0.0, SHARE_OF_DIAGONAL)[self._order][
            :, self._order
        ]

    @classmethod
    def _side(cls, moment: Tensor | None, size: int) -> _Side:
        return _Side.of(cls._moment(moment, size, RIDGE, 0.0))

    @staticmethod
    def _moment(moment: Tensor | None, size: int, ridge: float, share: float) -> Tensor:
        if moment is None:
            return torch.eye(size, dtype=torch.float64)
        moment = moment.double()
        diagonal = moment.diagonal()
        mean = float(diagonal.mean())
        return (1 - share) * moment + torch.diag(share * diagonal + (ridge + 1e-6) * mean)

    @cached_property
    def columns(self) -> Tensor | None:
        """Factors of the columns, `(1, in)`; None where they take more bits than they save."""
        weights = self._right.weights
        gain = weights.mean().log2() - weights.log2().mean()
        if 0.5 * len(self._matrix) * float(gain) < 16:
            return None
        # A coarse grid costs little, and keeps the factors compressible.
        factors = torch.exp2(-0.5 * weights.log2())
        middle = factors.log2().mean()
        grid = torch.exp2((2 * (factors.log2() - middle)).round() / 2)
        return grid.half().double().unsqueeze(0)

    @cached_property
    def _column_weight(self) -> float:
        """The mean cost of an error of one unit in a column, before scales of rows."""
        weights = self._right.weights
        if self.columns is not None:
            weights = weights * self.columns.square().squeeze(0)
        return float(weights.mean())

    @cached_property
    def _row_weights(self) -> list[Tensor]:
        """For each part of the rows, the weights of errors once later parts made good."""
        return _kept(_left_weights, self._metric.left, self._weights_of_rows)

    def _weights_of_rows(self) -> list[Tensor]:
        found, start = [], 0
        for size in self._sizes:
            inverse = torch.cholesky_inverse(cholesky(self._left[start:, start:]))
            found.append(torch.cholesky_inverse(cholesky(inverse[:size, :size])).diagonal())
            start += size
        return found

    def sample(self) -> RoundingSample:
        """Some rows, by which the bits of all are estimated."""
        rows = torch.linspace(0, len(self._matrix) - 1, min(SAMPLED_ROWS, len(self._matrix))).long()
        weights = torch.cat(self._row_weights)[rows] * self._column_weight
        factors = torch.ones(1, self._matrix.shape[1]).double()
        if self.columns is not None:
            factors = self.columns.double()
        matrix = self._matrix[self._order][rows]
        return RoundingSample(matrix, weights, factors, self._right.feedback, self._matrix.numel())

    def at(self, step: float, largest: int = LARGEST) -> Rounded:
        """The matrix as integers.

        Args:
            step: the error of an entry is up to half of it, in units of the root of the cost.
            largest: the integers are from `-largest` to `largest`.
        """
        matrix, columns = self._matrix[self._order], self.columns
        factors = torch.ones(1, matrix.shape[1]).double() if columns is None else columns.double()
        values, errors = torch.empty_like(matrix), torch.zeros_like(matrix)
        scales = torch.empty(len(matrix), 1, dtype=matrix.dtype)
        start = 0
        for size, weights in zip(self._sizes, self._row_weights, strict=True):
            stop = start + size
            scale = step / (weights * self._column_weight).sqrt().unsqueeze(1)
            least = _least_scale(matrix[start:stop] / factors, largest)
            scale = half_exact(torch.maximum(scale, least))
            target = matrix[start:stop]
            if start:
                # What these rows should err by, given the errors of those before.
                root = cholesky(self._left[start:, start:])
                wanted = torch.cholesky_solve(self._left[start:, :start] @ errors[:start], root)
                target = target + wanted[:size]
            values[start:stop] = gptq(target, scale, factors, self._right.feedback, largest)
            errors[start:stop] = matrix[start:stop] - values[start:stop] * scale * factors
            scales[start:stop] = scale
            start = stop
        back = torch.argsort(self._order)
        return Rounded(values[back].to(torch.int8), scales[back].float(), _float(columns))

    def to_bits(self, bits: float) -> Rounded:
        """The matrix as integers that take so many bits on average, entropy-coded."""
        sample, low, high = self.sample(), -40.0, 20.0
        for _ in range(24):
            middle = (low + high) / 2
            is_finer = sample.bits(2.0**middle) > bits * sample.count
            low, high = (middle, high) if is_finer else (low, middle)
        return self.at(2.0**high)

    def cost(self, rounded: Rounded) -> float:
        """What rounding costs."""
        return self._metric.cost(self._matrix - rounded.matrix.double())


def in_bits(matrix: Tensor, bits: int, moment: Tensor | None = None) -> Rounded:
    """A matrix in a given number of bits, with a scale a row.

    Args:
        matrix: `(out, in)`.
        bits: of each integer.
        moment: of the inputs, `(in, in)`: later entries make good what rounding cost before. Of
            none, each entry is rounded to nearest.
    """
    target, largest = matrix.detach().double(), 2 ** (bits - 1) - 1
    scale = half_exact((target.abs().amax(1, keepdim=True) / largest).clamp(min=1e-30))
    if moment is None:
        values = (target / scale).round().clamp(-largest - 1, largest)
    else:
        columns = target.shape[1]
        feedback = Rounding._side(moment, columns).feedback
        values = gptq(target, scale, torch.ones(1, columns).double(), feedback, largest)
    return Rounded(values.to(torch.int8), scale.float(), None)


def alike_inputs(count: int) -> Tensor:
    """The moment of inputs that are mostly alike, as of neighbouring positions in one channel."""
    return ALIKE * torch.ones(count, count).double() + (1 - ALIKE) * torch.eye(count).double()


@dataclass(frozen=True)
class RoundingSample:
    """Some rows of a matrix, ready to be rounded at any step.

    Args:
        matrix: `(rows, in)`.
        weights: of the errors of each row.
        factors: of the columns, `(1, in)`.
        feedback: of errors to later columns.
        count: entries of the whole matrix.
    """

    matrix: Tensor
    weights: Tensor
    factors: Tensor
    feedback: Tensor
    count: int

    def bits(self, step: float) -> float:
        """An estimate of the bits of the whole, entropy-coded, without its scales."""
        scale = step / self.weights.sqrt().unsqueeze(1)
        scale = torch.maximum(scale, _least_scale(self.matrix / self.factors, LARGEST))
        values = gptq(self.matrix, scale, self.factors, self.feedback, LARGEST)
        return self.count * entropy(values)


# What follows from a moment alone, as long as the moment is: many plans round factors of the same
# weights, and their Cholesky roots took most of the time of a forecast.
_sides: MutableMapping[Tensor, _Side] = WeakIdKeyDictionary()
_left_weights: MutableMapping[Tensor, list[Tensor]] = WeakIdKeyDictionary()


def _kept(known: MutableMapping[Tensor, T], moment: Tensor | None, make: Callable[[], T]) -> T:
    if moment is None:
        return make()
    if moment not in known:
        known[moment] = make()
    return known[moment]


def gptq(
    target: Tensor, scale: Tensor, factors: Tensor, feedback: Tensor, largest: int
) -> Tensor:  # fmt: skip
    """Whole numbers for some rows, column by column; later columns make good earlier errors.

    Args:
        target: `(rows, in)`.
        scale: of each row, `(rows, 1)`.
        factors: of each column, `(1, in)`.
        feedback: unit upper triangular; row j moves later columns by the error of column j.
        largest: the numbers are from `-largest` to `largest`.
    """
    # In NumPy, whose calls take a third of torch's time, and by rows: one for each column.
    left, back = target.t().contiguous().numpy().copy(), feedback.numpy()
    units = (factors.t() * scale.t()).numpy()
    values, errors = np.empty_like(left), np.empty_like(left)
    for start in range(0, len(left), AT_ONCE):
        stop = min(start + AT_ONCE, len(left))
        for j in range(start, stop):
            np.rint(left[j] / units[j], out=values[j])
            np.clip(values[j], -largest, largest, out=values[j])
            np.subtract(left[j], values[j] * units[j], out=errors[j])
            left[j + 1 : stop] -= np.multiply.outer(back[j, j + 1 : stop], errors[j])
        left[stop:] -= back[start:stop, stop:].T @ errors[start:stop]
    return torch.from_numpy(values).t()


def entropy(values: Tensor) -> float:
    """Bits that a whole number takes on average, by how often each occurs."""
    whole = values.reshape(-1).long()
    counts = torch.bincount(whole - whole.min()).double()
    share = counts[counts > 0] / len(whole)
    return -float((share * share.log2()).sum())


def _least_scale(rows: Tensor, largest: int) -> Tensor:
    """Scales below which more than a few entries of a row would be clipped, `(out, 1)`."""
    if largest >= LARGEST:
        return rows.abs().amax(1, keepdim=True).clamp(min=HALF_LEAST * LARGEST) / LARGEST
    # Of a few, that with the least squared error.
    ends = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    tried = torch.stack([ends * share for share in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)])
    rounded = (rows / tried).round().clamp(-largest, largest) * tried
    best = (rounded - rows).square().sum(2, keepdim=True).argmin(0, keepdim=True)
    return tried.gather(0, best).squeeze(0)


def half_exact(scales: Tensor) -> Tensor:
    """Scales that float16 holds exactly, where they are within its range."""
    halves = scales.half().to(scales.dtype)
    within = bool(scales.min() >= HALF_LEAST) and bool(scales.max() <= HALF_MOST)
    return halves if within else scales.float().to(scales.dtype)


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


def width_of(values: Tensor, least: int = 2, most: int = 8) -> int:
    """The fewest bits that hold all of these integers.

    Args:
        values: whole numbers.
        least, most: bits. Between them, only widths that lie within one byte.
    """
    low, high = int(values.min()), int(values.max())
    widths = sorted({least, most, *(b for b in (2, 4, 8) if least <= b <= most)})
    return next(b for b in widths if -(2 ** (b - 1)) <= low and high < 2 ** (b - 1))


def cost_of_step(step: float, count: int) -> float:
    """The cost of so many entries, each off by half a step at most."""
    return count * step**2 / 24
