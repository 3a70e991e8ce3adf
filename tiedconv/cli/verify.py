"""`tiedconv verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tiedconv.cli import common
from tiedconv.cli.common import out
from tiedconv.commands.verify import verify as run

_MARKS = {True: ("ok ", "green"), False: ("bad", "red"), None: ("-- ", "yellow")}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(verify))


def verify(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An exported file to compare with: .onnx, .pt2, .xml, or a dense state dict.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to compare with, besides random ones."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="How many of them.", min=2)] = 16,
    trust_code: common.TrustCode = False,
    json_: common.Json = False,
) -> None:
    """Check a compact file from its bytes to its outputs.

    Hashes, references and shapes; the model builds and holds each number once; its outputs agree
    with those of the dense form. With --against, an exported file holds each number once too and
    gives the same logits. Exit code 0 means all of it, 1 a broken promise, 2 a damaged file.
    """
    checks = run(file, against=against, images=images, count=count, trust_code=trust_code)
    if json_:
        common.print_json({"file": file, "checks": checks})
        return
    for check in checks:
        line = Text.assemble(_MARKS[check.passed], f"  {check.name:<8} {check.detail}")
        out.print(line, soft_wrap=True)
