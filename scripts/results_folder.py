"""Where measured figures lie, and what was written about them by hand."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def comment_on(name: str) -> str:
    """The sentences that go with a table; none where nothing was written."""
    path = RESULTS / f"{name}_comment.md"
    return path.read_text("utf-8").strip() if path.is_file() else ""
