"""Sums of second moments, each held as the upper triangle that a symmetric matrix needs."""

from __future__ import annotations

import torch
from torch import Tensor

STRIP = 256
"""Rows that are computed at a time, each from the diagonal on; what is left of it is mirrored."""

LARGEST = 16_384
"""Rows of a sum that is held. Of a wider one, such as the 25,088 inputs of VGG's classifier, only
the trace is: the sum would take gigabytes, and its roots hours."""

_BYTES = 8 + 4  # of an entry: over all images in float64, over the first half in float32


class SecondMoment:
    """The sum of `r r^T` over rows `r`, over all images and over the first half of them.

    The half only decides how far the whole is shrunk, for which float32 has enough digits.

    Attributes:
        rows: how many were added of each half.
        width: of the sum; 0 before the first rows.
    """

    def __init__(self) -> None:
        self.rows = [0, 0]
        self.width = 0
        self._whole: list[Tensor] = []
        self._first: list[Tensor] = []
        self._trace = 0.0

    @staticmethod
    def nbytes(width: int) -> int:
        """Bytes that a sum `(width, width)` takes."""
        if width > LARGEST:
            return 0
        return _BYTES * sum(min(STRIP, width - top) * (width - top) for top in _tops(width))

    def add(
        self, rows: Tensor, half: int, *, start: int = 0, width: int = 0, scale: float = 1.0
    ) -> None:
        """Adds the outer products of rows with themselves.

        Args:
            rows: `(n, columns)`.
            half: 0 or 1.
            start: first of the columns of the sum that these rows have.
            width: columns of the sum; those of the rows by default.
            scale: factor of the outer products.
        """
        rows = rows.float()
        stop = start + rows.shape[1]
        self.width = self.width or width or stop
        if self.width > LARGEST:
            self.rows[half] += len(rows)
            self._trace += scale * float(rows.square().sum(dtype=torch.float64))
            return
        if not self._whole:
            for top in _tops(self.width):
                shape = min(STRIP, self.width - top), self.width - top
                self._whole.append(rows.new_zeros(shape, dtype=torch.float64))
                self._first.append(rows.new_zeros(shape))
        self.rows[half] += len(rows)
        for i, top in enumerate(_tops(self.width)):
            low, high = max(top, start), min(top + STRIP, stop)
            if low >= high:
                continue
            part = rows[:, low - start : high - start].t() @ rows[:, low - start :]
            part.mul_(scale)
            for strips in (self._whole, self._first) if half == 0 else (self._whole,):
                strips[i][low - top : high - top, low - top : stop - top] += part

    def mean_entry(self, count: int) -> float | None:
        """Of a sum that is too wide, the mean of its diagonal, divided by `count`; else None."""
        return self._trace / (self.width * count) if self.width > LARGEST else None

    def mean(self, half: int, count: int) -> Tensor:
        """The sum over one half of the images, divided by `count`: `(width, width)` float64."""
        full = self._whole[0].new_empty(self.width, self.width)
        for top, whole, first in zip(_tops(self.width), self._whole, self._first, strict=True):
            strip = (first.double() if half == 0 else whole - first).div_(count)
            full[top : top + len(strip), top:] = strip
            full[top:, top : top + len(strip)] = strip.mT
        return full


def _tops(width: int) -> range:
    return range(0, width, STRIP)
