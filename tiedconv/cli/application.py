"""The commands, in the order in which they are used."""

from __future__ import annotations

from typing import Annotated

import typer

from tiedconv.cli import (
    bench,
    convert,
    demo,
    evaluate,
    export,
    finetune,
    info,
    plan,
    push,
    report,
    sensitivity,
    verify,
)
from tiedconv.version import __version__

app = typer.Typer(
    name="tiedconv",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first look: tiedconv demo. A plan without work: tiedconv convert resnet50 --dry-run.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tiedconv {__version__}")
        raise typer.Exit


@app.callback()
def tiedconv(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make pretrained vision models compact: weights tied to their transpose, or one shared
    base for a stack of layers plus low-rank residuals."""


for _module in (
    plan,
    sensitivity,
    convert,
    finetune,
    evaluate,
    report,
    verify,
    export,
    bench,
    push,
    demo,
    info,
):
    _module.register(app)
