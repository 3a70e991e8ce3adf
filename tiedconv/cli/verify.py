"""`tiedconv verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import out

_MARKS = {True: ("ok ", "green"), None: ("-- ", "yellow")}


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        verify,
        "tiedconv verify compact.safetensors",
        "tiedconv verify compact.safetensors --against model.onnx --data PHOTOS",
    )


def verify(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="An exported file to compare with: .onnx, .pt2, .xml, a compact file, or a dense "
            "state dict.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--data", metavar="DIR", help="A folder of images to compare on, besides random ones."
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|WEIGHTS|auto",
            help="The model that the file was made from: compare each block with it.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("-n", "--limit", help="Number of images of --data.", min=2)
    ] = 16,
    allow_unchecked: Annotated[
        bool,
        typer.Option("--allow-unchecked", help="End with 0 although something was not compared."),
    ] = False,
    trust_code: common.TrustCode = False,
    json_: common.Json = False,
) -> None:
    """Check a compact file, from its bytes to its outputs.

    Hashes, references and shapes; the model builds and holds each stored tensor once; its outputs
    agree with those of the dense form. With --against, an exported file too holds each tensor once
    and gives the same outputs. With --original, each block is compared with the original's, and
    its distance with the error that the file reports.

    Exit code 0: all that is listed was compared; 1: a check failed; 2: the file is missing or
    damaged; 3: something could not be compared and is listed as "not checked".
    """
    from tiedconv.commands.verify import verify as run

    checks = run(
        file, against=against, images=images, original=original, count=count,
        trust_code=trust_code,
    )  # fmt: skip
    not_checked = [check.name for check in checks if check.passed is None]
    if json_:
        common.print_json({"file": file, "checks": checks, "not_checked": not_checked})
        _end(not_checked, allow_unchecked=allow_unchecked)
        return
    for check in checks:
        line = Text.assemble(_MARKS[check.passed], f"  {check.name:<8} {check.detail}")
        out.print(line, soft_wrap=True)
    rest = f", not checked: {', '.join(not_checked)}" if not_checked else ""
    common.say(f"{render.counted(len(checks) - len(not_checked), 'check')} passed{rest}.")
    _end(not_checked, allow_unchecked=allow_unchecked)


def _end(not_checked: Sequence[str], *, allow_unchecked: bool) -> None:
    """End with 3 if something was not compared, unless that was allowed."""
    if not_checked and not allow_unchecked:
        raise typer.Exit(3)
