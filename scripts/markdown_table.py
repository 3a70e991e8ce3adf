"""Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; columns after the first `words` are figures."""
    marks = ["---" if i < words else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, marks, *rows))
