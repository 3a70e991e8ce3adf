"""`tiedconv push` and `tiedconv card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli.command import add
from tiedconv.cli.common import say

License = Annotated[
    str, typer.Option(help="The original's licence, as the hub names it, such as apache-2.0.")
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, card)
    add(app, push)


def card(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    repository: Annotated[
        str,
        typer.Option(metavar="USER/NAME", help="Where it will lie, for the lines that load it."),
    ] = "",
    license: License = "",
) -> None:
    """Print a model card: sizes, what was measured and on what, how to load it, how it was made."""
    from tiedconv.commands.card import card as run

    typer.echo(run(file, repository=repository, license=license))


def push(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="On the hub.")],
    license: License = "",
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
) -> None:
    """Upload a compact file and its model card to the Hugging Face hub.

    Others load it with tiedconv.load("hub:USER/NAME"). Log in first: hf auth login.
    """
    from tiedconv.commands.push import push as run

    say(f"Uploaded: {run(file, repository, license=license, private=private)}")
    say(f"Next: python -c \"import tiedconv; tiedconv.load('hub:{repository}')\"")
