"""`tiedconv report`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import out
from tiedconv.report import Report
from tiedconv.report import report as run

COLUMNS = ("file", "model", "original", "stored", "ratio", "file size", "top-1")


class Format(StrEnum):
    """How to print a report."""

    TABLE = "table"
    JSON = "json"
    MD = "md"
    CSV = "csv"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(report))


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Compact files.")],
    format_: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.TABLE,
    all_groups: Annotated[
        bool, typer.Option("--all-groups", help="A line for each group, not for each kind.")
    ] = False,
    json_: common.Json = False,
) -> None:
    """Tell what compact files store: for each group and in all, and what was done with them.

    Only the head of a file is read. [b]tiedconv verify[/b] checks the bytes too.
    """
    reports = [run(file) for file in files]
    if json_ or format_ is Format.JSON:
        common.print_json(reports)
    elif format_ is Format.TABLE:
        for one in reports:
            _show(one, each=all_groups)
        if len(reports) > 1:
            out.print(render.table(COLUMNS, [_line(r) for r in reports], text=2))
    elif len(reports) > 1:
        _plain(COLUMNS, [_line(r) for r in reports], format_, text=2)
    else:
        _plain(render.GROUP_COLUMNS, _rows(reports[0], each=all_groups), format_, text=3)


def _rows(one: Report, *, each: bool) -> list[render.Row]:
    rows = render.group_rows(one, each=each)
    return [*rows, render.kept_row(one), render.total_row(one)]


def _plain(columns: tuple[str, ...], rows: list[render.Row], format_: Format, text: int) -> None:
    if format_ is Format.MD:
        typer.echo(render.markdown(columns, rows, text))
    else:
        typer.echo(render.as_csv(columns, rows))


def _line(one: Report) -> render.Row:
    return (
        one.name, one.model, f"{one.original:,}", f"{one.stored:,}", render.percent(one.ratio),
        render.size(one.file_bytes), render.accuracy(one.top1),
    )  # fmt: skip


def _show(one: Report, *, each: bool) -> None:
    title = f"{one.name}: {one.model}"
    out.print(render.table(render.GROUP_COLUMNS, _rows(one, each=each), title, text=3))
    out.print(
        f"{one.original:,} parameters became {one.stored:,} ({render.percent(one.ratio)}); the "
        f"file has {render.size(one.file_bytes)}. FLOPs are unchanged: every weight keeps its "
        "shape when it is used. Views are free; computed weights are cached by freeze()."
    )
    for line in render.history_lines(one.history):
        out.print(f"- {line}")
    versions = (one.source or {}).get("versions") or {}
    if versions:
        out.print("- made with " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))
    out.print()
