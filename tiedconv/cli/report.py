"""`tiedconv report`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import say
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.commands.report import Report

T = TypeVar("T")

COLUMNS = ("file", "model", "original", "stored", "ratio", "file size", "top-1")
FURTHER = {"agreement": "agreement", "AP": "ap"}
"""Columns shown if a file has the figure, and the name of the figure."""


class Format(StrEnum):
    """Output format of a report."""

    TABLE = "table"
    JSON = "json"
    MD = "md"
    CSV = "csv"


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        report,
        "tiedconv report compact.safetensors",
        "tiedconv report compact.safetensors -o report.html",
        "tiedconv report small.safetensors smaller.safetensors -o both.html",
    )


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Compact files.")],
    format_: Annotated[
        Format, typer.Option("--format", help="Output format; csv lists every group.")
    ] = Format.TABLE,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PAGE.html",
            help="Write one HTML page instead, with pictures, which needs no network.",
        ),
    ] = None,
    log: Annotated[
        list[Path] | None,
        typer.Option(
            "--log",
            metavar="LOG",
            help="For the page: what finetune --log wrote, for the curves. May be repeated.",
        ),
    ] = None,
    license: Annotated[
        str, typer.Option(help="For the page: the original's licence, such as apache-2.0.")
    ] = "",
    force: common.Force = False,
    all_groups: common.AllGroups = False,
    json_: common.Json = False,
) -> None:
    """Print a parameter and size report: by group and in total, and the history of the file.

    Only the header of a file is read, and for a page its bytes, for their hash. [b]tiedconv
    verify[/b] checks them.
    """
    from tiedconv.commands.report import report as run

    if output is not None:
        _refuse_with_page(format_, all_groups=all_groups)
        _write_page(files, output, log or [], license, force=force, quiet=json_)
    elif log or license or force:
        raise UserError(
            "--log, --license or --force was given without -o",
            "They are for a page alone",
            "Add -o report.html, or leave them out",
            code="needs-output",
        )
    reports = [run(file) for file in files] if json_ or output is None else []
    if json_ or format_ is Format.JSON:
        common.print_json(reports)
    elif output is not None:
        return
    elif format_ is Format.TABLE:
        for one in reports:
            _show(one, each=all_groups)
        if len(reports) > 1:
            columns, lines = _table(reports, _line)
            common.show_table(columns, lines, text=2)
    elif len(reports) > 1:
        if format_ is Format.CSV:
            typer.echo(render.as_csv(*_table(reports, _exact_line)))
        else:
            typer.echo(render.markdown(*_table(reports, _line), text=2))
    elif format_ is Format.CSV:
        typer.echo(render.as_csv(render.GROUP_COLUMNS, render.exact_rows(reports[0])))
    else:
        rows = _rows(reports[0], each=all_groups)
        typer.echo(render.markdown(render.GROUP_COLUMNS, rows, text=3))


def _refuse_with_page(format_: Format, *, all_groups: bool) -> None:
    if format_ is not Format.TABLE or all_groups:
        raise UserError(
            "-o was given with --format or --all-groups",
            "They are for what is printed, and a page has all groups",
            "Leave them out; --json prints the figures besides",
            code="options-conflict",
        )


def _write_page(
    files: Sequence[Path], output: Path, logs: Sequence[Path], license: str, *, force: bool,
    quiet: bool,
) -> None:  # fmt: skip
    from tiedconv.pages.page import check_page, report_page, write_page

    check_page(output, [*files, *logs], force=force)
    size = write_page(report_page(*files, logs=logs, license=license), output, force=force)
    if not quiet:
        say(f"Wrote {output} ({render.size(size)}).")


def _rows(one: Report, *, each: bool) -> list[render.Row]:
    rows = render.group_rows(one, each=each)
    return [*rows, render.kept_row(one), render.total_row(one)]


def _table(
    reports: Sequence[Report], line: Callable[[Report, Sequence[str]], Sequence[T]]
) -> tuple[Sequence[str], list[Sequence[T]]]:
    """Columns and a line for each file."""
    further = {
        name: figure
        for name, figure in FURTHER.items()
        if any(getattr(one, figure) is not None for one in reports)
    }
    return (*COLUMNS, *further), [line(one, tuple(further.values())) for one in reports]


def _line(one: Report, further: Sequence[str]) -> render.Row:
    return (
        one.name, one.model, f"{one.original:,}", f"{one.stored:,}", render.percent(one.ratio),
        render.size(one.file_bytes), render.accuracy(one.top1),
        *(render.accuracy(getattr(one, figure)) for figure in further),
    )  # fmt: skip


def _exact_line(one: Report, further: Sequence[str]) -> Sequence[object]:
    return (
        one.name, one.model, one.original, one.stored, one.ratio, one.file_bytes, one.top1,
        *(getattr(one, figure) for figure in further),
    )  # fmt: skip


def _show(one: Report, *, each: bool) -> None:
    title = f"{one.name}: {one.model}"
    common.show_groups(_rows(one, each=each), title)
    say(
        f"{one.original:,} parameters became {one.stored:,} ({render.percent(one.ratio)}); the "
        f"file takes up {render.against_original(one)}. {render.work(one)}"
    )
    if one.integers:
        say(render.precision(one))
    say(render.LEGEND)
    say(render.preparation((one.source or {}).get("preprocess")))
    on_images = any(entry.get("calibration") for entry in one.history)
    say(render.FIT_ERROR_ON_IMAGES if on_images else render.FIT_ERROR)
    for entry in one.history:
        for line in render.symmetry_lines(entry):
            say(line)
    for line in render.history_lines(one.history):
        say(f"- {line}")
    versions = (one.source or {}).get("versions") or {}
    if versions:
        say("- made with " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))
    say("")
