"""`tiedconv info` and `tiedconv list`."""

from __future__ import annotations

from typing import Annotated

import typer

from tiedconv.cli import common
from tiedconv.cli.command import add
from tiedconv.cli.common import say
from tiedconv.errors import UserError

KINDS = ("models", "schemes", "families", "exporters", "tasks")


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, info)
    add(app, list)


def info(*, json_: common.Json = False) -> None:
    """Show versions, optional packages and devices: what a bug report needs."""
    from tiedconv.commands.info import info as run

    found = run()
    if json_:
        common.print_json(found)
        return
    say(f"{found.system}, {found.threads} threads of torch")
    say(f"Accelerators: {', '.join(found.devices) or 'none'}")
    say(", ".join(f"{name} {version}" for name, version in found.versions.items()))
    rows = []
    for extra, packages in found.extras.items():
        there = [f"{name} {version}" for name, version in packages.items() if version]
        missing = [name for name, version in packages.items() if not version]
        ask = f"pip install 'tiedconv[{extra}]'" if missing else ""
        rows.append((extra, ", ".join(there), ", ".join(missing), ask))
    common.show_table(("extra", "installed", "missing", "install it with"), rows)


def list(
    what: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(KINDS)}.", metavar="WHAT", autocompletion=common.completed(*KINDS)
        ),
    ],
    pattern: Annotated[
        str, typer.Argument(help="Of models: only names that match, such as 'vit*'.")
    ] = "*",
    *,
    json_: common.Json = False,
) -> None:
    """List what can be named: models, schemes, families, export formats, tasks."""
    if what not in KINDS:
        raise UserError(
            f"There is no list of {what}", hint=f"Choose {', '.join(KINDS)}", code="unknown-list"
        )
    if what == "models":
        from tiedconv.sources.names import model_names

        names = model_names(pattern)
    else:
        names = [name for name in common.names_in(what) if name != "inspect"]
    if json_:
        common.print_json(names)
        return
    for name in names:
        say(name)
