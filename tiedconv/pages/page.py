"""The verb `report_page`: what files record as one HTML page, to open, print and pass on."""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from tiedconv.errors import OutputError, UserError
from tiedconv.io.atomic import check_output, replacing
from tiedconv.loggers import LoggedRun
from tiedconv.loggers.log_reader import read_log
from tiedconv.pages import treemap
from tiedconv.pages.facts import FileFacts, facts_of
from tiedconv.pages.parts import in_common
from tiedconv.utils.figures import counted, percent, size, span
from tiedconv.version import __version__

SUFFIXES = (".html", ".htm")


def report_page(*files: str | Path, logs: Sequence[str | Path] = (), license: str = "") -> str:
    """An HTML page about compact files: sizes, bits, errors, results, history, how to load them.

    The page is one text without scripts that loads nothing from elsewhere. All in it is what the
    files record; what they don't is named. Several files are compared side by side.

    Args:
        files: compact files, at least one.
        logs: that `finetune --log` wrote of the training of one of them, for its curves.
        license: of the original, which holds for the compact model too.

    Returns:
        the HTML.

    Raises:
        CheckpointError: a file is missing, damaged or not tiedconv's.
        DataError: a log can't be read.
        UserError: no file, or a log of another file's training (`log-of-another-run`).
    """
    if not files:
        raise UserError(
            "There is no file to report on", hint="Name compact files", code="no-file-given"
        )
    runs = [read_log(Path(log)) for log in logs]
    facts = [facts_of(file, runs) for file in files]
    _require_used(runs, facts)
    style = _environment().get_template("style.css").render()
    return (
        _environment()
        .get_template("page.html")
        .render(
            files=facts,
            license=license,
            version=__version__,
            # The page's own style is all that may act: not even a text that got past the escapes.
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            comparable=in_common([f.parts for f in facts]),
            kinds=_kinds(facts),
        )
    )


def check_page(path: Path, files: Sequence[Path] = (), *, force: bool = False) -> None:
    """Raise OutputError, before any work, if no page can be written to `path`.

    Args:
        path: of the page.
        files: that it is about.
        force: an existing file may be replaced.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise OutputError(
            f"{path} has no suffix of a page",
            "Nothing was written",
            "Use .html",
            code="unknown-page-format",
        )
    if path.resolve() in {file.resolve() for file in files}:
        raise OutputError(
            f"{path} is a file to report on",
            "It would be replaced by the page",
            "Choose another with -o",
            code="output-paths-collide",
        )
    check_output(path, force=force)


def write_page(page: str, path: Path, *, force: bool = False) -> int:
    """Write a page whole or not at all; returns its bytes.

    Raises:
        OutputError: it can't be written.
    """
    data = page.encode()
    with replacing(path, force=force) as temp:
        temp.write_bytes(data)
    return len(data)


def _require_used(runs: Sequence[LoggedRun], facts: Sequence[FileFacts]) -> None:
    used = [each.run for each in facts]
    for run in runs:
        if run not in used:
            raise UserError(
                f"{run.name} is the log of a training of {run.output}",
                "No such file is reported on",
                "Give that file, under the name that the training wrote, or leave out the log",
                code="log-of-another-run",
            )


def _kinds(facts: Sequence[FileFacts]) -> list[tuple[str, str]]:
    """(kind, title) of every figure that the files' last measurements have, in order."""
    return list({m.kind: (m.kind, m.title) for each in facts for m in each.results}.values())


def _boxes(facts: FileFacts, stored: bool, largest: float) -> tuple[treemap.Box, ...]:
    return treemap.treemap(facts.parts, stored=stored, largest=largest)


@functools.cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("tiedconv.pages"),
        autoescape=True,  # whatever the name of a template: all texts are of files
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown: dict[str, Any] = {
        "size": size, "percent": percent, "count": lambda n: f"{n:,}", "counted": counted,
        "bits": lambda n: f"{n:.2f}", "figure": lambda n: f"{n:.3g}", "times": _times,
        "bar": lambda part, whole: f"{100 * min(1.0, part / whole) if whole else 0:.2f}",
        "point": lambda n: f"{n:.1f}", "points": _points,
    }  # fmt: skip
    made.filters.update(shown)
    made.globals.update(treemap=_boxes, map_width=treemap.WIDTH, map_height=treemap.HEIGHT)
    made.globals["span"] = span
    return made


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _times(ratio: float) -> str:
    """How many times smaller, of a ratio."""
    return f"{1 / ratio:.1f}" if ratio else ""
