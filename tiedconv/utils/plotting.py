"""Pictures, written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from tiedconv.errors import MissingExtra, OutputError
from tiedconv.io.atomic import check_output, replacing


def check_picture(path: Path, *, force: bool = False, option: str = "-o") -> None:
    """Raise OutputError, before any work, if no picture can be written to `path`."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise OutputError(
            f"{path} has no suffix of a picture format",
            "Nothing was drawn",
            "Use .png, .svg or .pdf",
            code="unknown-picture-format",
        )
    check_output(path, force=force, option=option)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra.of("matplotlib", "demo", "The picture") from None
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(figure: Any, path: Path, *, force: bool = False) -> None:
    """Write a figure in the form that the ending says.

    Raises:
        OutputError: the file can't be written.
    """
    # Drawn first, as that takes long: a kill meanwhile leaves no temporary file.
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=140, format=path.suffix[1:].lower())
    with replacing(path, force=force) as temporary:
        temporary.write_bytes(drawn.getvalue())
