"""Figures as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence


def span(ends: Sequence[str]) -> str:
    """`a-b`, or `a` if both are the same."""
    return "-".join(dict.fromkeys(ends))


def percent(fraction: float | None) -> str:
    """A fraction as a percentage."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def accuracy(fraction: float | None) -> str:
    """An accuracy as a percentage with two decimals; a dash where none could be measured."""
    return "-" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f} %"


def counted(count: int, what: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def size(count: float) -> str:
    """Bytes in decimal units, as disks and downloads count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def milliseconds(nanoseconds: float) -> str:
    """A short time, such as 5.12 ms."""
    return f"{three_digits(nanoseconds / 1e6)} ms"


def three_digits(value: float) -> str:
    """A measured number with three digits that count, such as 5.12, 51.2, 512 and 5,120."""
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(places, 3)}f}"
