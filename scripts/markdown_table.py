"""Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; columns after the first `words` are figures."""
    marks = ["---" if i < words else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, marks, *rows))


def ranged(figures: Sequence[float], digits: int = 2) -> str:
    """The mean, and the range where there are several."""
    low, high = (f"{f:.{digits}f}" for f in (min(figures), max(figures)))
    spread = f" ({low} to {high})" if len(figures) > 1 else ""
    return f"{statistics.fmean(figures):.{digits}f}{spread}"
