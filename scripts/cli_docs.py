"""Write `docs/cli.md` from the commands and options of the command line.

python scripts/cli_docs.py [--check]
"""

from __future__ import annotations

import inspect
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from generated_page import write_or_check
from typer.models import ArgumentInfo

from tiedconv.cli import app

PATH = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """# Command line

`tiedconv COMMAND --help` prints the same. This page is made from the commands by `scripts/cli_docs.py`.

| command | what it does |
| --- | --- |
"""
# Options that all commands have, which have a section of their own.
COMMON = ("json_", "quiet", "verbose")
VALUES = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def main() -> int:
    return write_or_check(PATH, page())


def page() -> str:
    """The whole page."""
    commands = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    commands = {name.rstrip("_"): command for name, command in commands.items()}
    rows = [f"| [`{name}`](#{name}) | {described(c)[0]} |\n" for name, c in commands.items()]
    sections = [section(name, command) for name, command in commands.items()]
    ends = {p.name: row(p) for c in commands.values() for p in parameters(c) if p.name in COMMON}
    common = table("option", [ends[name] for name in COMMON])
    last = f"\n## Options of every command\n\n{common}"
    return HEAD + "".join(rows) + "".join(sections) + last


def section(name: str, command: Callable[..., None]) -> str:
    """A command: what it does, and its options by groups."""
    groups: dict[str, list[str]] = {}
    for parameter in parameters(command):
        if parameter.name not in COMMON and not info(parameter).hidden:
            groups.setdefault(group(parameter), []).append(row(parameter))
    arguments = [spelled(p) for p in parameters(command) if isinstance(info(p), ArgumentInfo)]
    usage = " ".join(["tiedconv", name, *arguments, "[OPTIONS]"])
    parts = [f"\n## {name}", f"```text\n{usage}\n```", *described(command)]
    return "\n\n".join(parts) + "\n" + "".join(f"\n{table(t, rows)}" for t, rows in groups.items())


def table(title: str, rows: list[str]) -> str:
    return "\n".join([f"| {title} | |", "| --- | --- |", *rows]) + "\n"


def parameters(command: Callable[..., None]) -> list[inspect.Parameter]:
    """Arguments first, then options."""
    found = inspect.signature(command, eval_str=True).parameters.values()
    found = [p for p in found if typing.get_origin(p.annotation) is Annotated]
    return sorted(found, key=lambda p: not isinstance(info(p), ArgumentInfo))


def info(parameter: inspect.Parameter) -> Any:
    """What Typer is given of a parameter."""
    return parameter.annotation.__metadata__[0]


def kind(parameter: inspect.Parameter) -> Any:
    """The type of a value: of the items of a list, and without None."""
    hint = parameter.annotation.__origin__
    while typing.get_origin(hint) in (list, tuple, typing.Union, types.UnionType):
        hint = typing.get_args(hint)[0]
    return hint


def group(parameter: inspect.Parameter) -> str:
    is_argument = isinstance(info(parameter), ArgumentInfo)
    return info(parameter).rich_help_panel or ("argument" if is_argument else "option")


def spelled(parameter: inspect.Parameter) -> str:
    """As it is written on the command line."""
    given = info(parameter)
    if isinstance(given, ArgumentInfo):
        name = (given.metavar or parameter.name).strip("[]{}").upper()
        return name if parameter.default is inspect.Parameter.empty else f"[{name}]"
    is_flag = kind(parameter) is bool
    dashed = "--" + parameter.name.strip("_").replace("_", "-")
    # In Annotated, the first name stands where a default would.
    words = [given.default, *(given.param_decls or ())]
    declared = [word for word in words if isinstance(word, str) and word.startswith("-")]
    names = declared or [f"{dashed}/--no-{dashed[2:]}" if is_flag else dashed]
    names = sorted(names, key=lambda name: not name.startswith("--"))
    value = "" if is_flag else f" {given.metavar or VALUES.get(kind(parameter), 'TEXT')}"
    return ", ".join(names) + value.replace("|", ",")


def row(parameter: inspect.Parameter) -> str:
    """A line of a table."""
    text, default = info(parameter).help or "", parameter.default
    of_interest = isinstance(default, str | int | float | Path) and not isinstance(default, bool)
    if of_interest and default != "" and "default" not in text.lower():
        text += f" Default: {default}."
    return f"| `{escaped(spelled(parameter))}` | {escaped(text)} |"


def described(command: Callable[..., None]) -> list[str]:
    """The docstring of a command, a paragraph each."""
    return [escaped(p) for p in re.split(r"\n\s*\n", inspect.getdoc(command) or "")]


def escaped(text: str) -> str:
    """Text in one line, without what Markdown reads in it; what Rich prints bold is code."""
    text = re.sub(r"\[/?b(?:old)?\]", "`", text)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


if __name__ == "__main__":
    sys.exit(main())
