"""`tiedconv export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import say
from tiedconv.export import export as run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(export))


def export(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write: .safetensors or .pth.")
    ],
    to: Annotated[
        str, typer.Option(help="[b]dense[/b]: the plain state dict of the original class.")
    ] = "dense",
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Write a compact model in a form that needs no tiedconv.

    The dense form loads into the original class with strict=True. It has the original's size:
    ties can't be said in a plain state dict.
    """
    done = run(file, output, to, trust_code=trust_code, force=force)
    if json_:
        common.print_json(done)
        return
    say(
        f"Wrote {done.path} ({render.size(done.size)}): {done.tensors} tensors, "
        f"{done.parameters:,} numbers."
    )
