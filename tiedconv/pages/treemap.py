"""A model as an area: each part is a rectangle, as large as its bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tiedconv.pages.parts import Part

WIDTH, HEIGHT = 360.0, 220.0
_LEAST = 1e-6  # of a side, which rounding may take below zero


@dataclass(frozen=True)
class Box:
    """A rectangle.

    Args:
        x, y, width, height: of it, in units of the picture.
        part: that it stands for.
        size: bytes.
    """

    x: float
    y: float
    width: float
    height: float
    part: Part
    size: float

    @property
    def label(self) -> str:
        """The end of the part's name, if there is room for it."""
        name = self.part.name if len(self.part.name) <= 40 else self.part.name[-40:]
        words = name.split(".")
        fitting = [".".join(words[i:]) for i in range(len(words))]
        room = (self.width - 10) / 6.2  # of a letter
        if self.height < 18:
            return ""
        return next((text for text in fitting if len(text) <= room and text.strip("*.")), "")


def treemap(parts: Sequence[Part], *, stored: bool, largest: float) -> tuple[Box, ...]:
    """The parts of a model, before or after, to a scale that pictures side by side share.

    Squarified: rows are filled while that makes the worst proportion better (Bruls, Huizing and van
    Wijk, Squarified Treemaps, 2000).

    Args:
        parts: of the model.
        stored: whether the bytes after the conversion are drawn.
        largest: bytes that fill the whole picture.
    """
    sizes = [(p.stored if stored else p.original, p) for p in parts]
    sizes = sorted(((s, p) for s, p in sizes if s > 0), key=lambda pair: -pair[0])
    share = math.sqrt(sum(size for size, _ in sizes) / largest) if largest else 0
    return tuple(_boxes(sizes, 0.0, 0.0, WIDTH * share, HEIGHT * share))


def _boxes(
    sizes: list[tuple[float, Part]], x: float, y: float, width: float, height: float
) -> Iterator[Box]:
    while sizes:
        total = sum(size for size, _ in sizes)
        scale = width * height / total  # of a byte
        count = _row(sizes, scale, min(width, height))
        row, sizes = sizes[:count], sizes[count:]
        taken = sum(size for size, _ in row)
        along = width < height  # the row lies along the shorter side
        thick = (height if along else width) * taken / total
        at = 0.0
        for size, part in row:
            length = (width if along else height) * size / taken
            if along:
                yield Box(x + at, y, length, thick, part, size)
            else:
                yield Box(x, y + at, thick, length, part, size)
            at += length
        if along:
            y, height = y + thick, max(height - thick, _LEAST)
        else:
            x, width = x + thick, max(width - thick, _LEAST)


def _row(sizes: Sequence[tuple[float, Part]], scale: float, side: float) -> int:
    """How many of the first sizes make the row whose worst rectangle is the least oblong."""
    best, count, total = math.inf, 0, 0.0
    for size, _ in sizes:
        total += size
        thick = total * scale / side
        lengths = [s * scale / thick for s, _ in (sizes[0], sizes[count])]
        worst = max(max(thick / length, length / thick) for length in lengths)
        if worst > best:
            break
        best, count = worst, count + 1
    return count
