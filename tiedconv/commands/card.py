"""The verb `card`: a model card of a compact file, as the hub shows it."""

from __future__ import annotations

import re
from pathlib import Path

from tiedconv.commands.loading import python_lines
from tiedconv.commands.measured import measured
from tiedconv.commands.report import Report, report
from tiedconv.sources.models import source_of
from tiedconv.sources.repository import FILE

_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)")


def card(file: str | Path, *, repository: str = "", license: str = "") -> str:
    """A model card in Markdown, with the front matter that the hub reads.

    Args:
        file: a compact file.
        repository: where it will lie, such as `me/small-vit`; for the lines that load it.
        license: of the original, which holds for the compact model too, as the hub names it.

    Raises:
        CheckpointError: the file is missing, damaged or not tiedconv's.
    """
    found = report(file)
    parts = (
        _front(found, license), _title(found), _sizes(found), _measured(found),
        _loading(found, repository), _history(found), _terms(found, license),
    )  # fmt: skip
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _front(found: Report, license: str) -> list[str]:
    base = _REPOSITORY.fullmatch(found.model)
    lines = ["---", "library_name: tiedconv", "tags:", "- tiedconv", "- model-compression"]
    lines += [f"base_model: {base[1]}"] if base else []
    lines += [f"license: {license}"] if license else []
    return [*lines, "---"]


def _title(found: Report) -> list[str]:
    share = 100 * found.file_bytes / found.original_bytes
    return [
        f"# {found.model}, compact", "",
        f"`{found.model}` in {share:.1f} % of its bytes, made with tiedconv: weights that layers "
        "share, low ranks, few bits. Its class, its inputs and its outputs are the original's.",
    ]  # fmt: skip


def _sizes(found: Report) -> list[str]:
    share = 100 * found.file_bytes / found.original_bytes
    return [
        "| | original | compact | |", "|---|---:|---:|---:|",
        f"| parameters | {found.original:,} | {found.stored:,} | {100 * found.ratio:.1f} % |",
        f"| bytes | {found.original_bytes:,} | {found.file_bytes:,} | {share:.1f} % |",
    ]  # fmt: skip


def _measured(found: Report) -> list[str]:
    """What was measured, each with its data; nothing is said of what was not."""
    lines = [f"- {each.sentence}" for each in measured(found.history)]
    none = "Nothing was measured: how far it answers as the original is not known."
    return ["## Measured", "", *(lines or [none])]


def _loading(found: Report, repository: str) -> list[str]:
    where = f"hub:{repository}" if repository else FILE
    source = None if found.source is None else source_of(found.source)
    return ["## Use", "", "```python", *python_lines(where, source), "```"]


def _history(found: Report) -> list[str]:
    commands = [str(entry["command"]) for entry in found.history if entry.get("command")]
    return ["## How it was made", "", "```", *commands, "```"] if commands else []


def _terms(found: Report, license: str) -> list[str]:
    if license:
        return []
    return ["## Licence", "", f"That of the original, `{found.model}`: see there."]
