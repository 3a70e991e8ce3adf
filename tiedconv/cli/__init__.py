"""The command line: Typer in, one call of a verb, Rich out."""

from __future__ import annotations

from tiedconv.cli.application import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line."""
    app()
