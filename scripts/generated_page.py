"""A page of docs/ that a script makes: written, or with `--check` compared with what is there."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(path: Path, text: str) -> int:
    """The exit code: 1 if the page is to be checked and is not current."""
    if "--check" not in sys.argv:
        path.write_text(text, "utf-8")
        return 0
    current = path.is_file() and path.read_text("utf-8") == text
    print(
        f"docs/{path.name} is current"
        if current
        else f"run python scripts/{Path(sys.argv[0]).name}"
    )
    return 0 if current else 1
