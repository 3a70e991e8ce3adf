"""The steps of a file's history, for people: a sentence, the command, everything recorded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedconv.commands.history import history_lines

_TITLES = {"convert": "Converted", "finetune": "Fine-tuned", "export": "Exported"}
_APART = ("step", "command", "versions")
LONGEST = 600
"""Characters of a value; the page says how many are left out."""


@dataclass(frozen=True)
class Step:
    """A step.

    Args:
        number: from 1.
        title: of what was done.
        sentence: how, and what was measured.
        command: as it was typed; "" if not recorded.
        versions: of the libraries.
        settings: all else that is recorded: name to text.
    """

    number: int
    title: str
    sentence: str
    command: str
    versions: str
    settings: tuple[tuple[str, str], ...]


def steps_of(history: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps of a history, oldest first."""
    lines = history_lines(history)
    return tuple(_step(n, *pair) for n, pair in enumerate(zip(history, lines, strict=True), 1))


def _step(number: int, entry: Mapping[str, Any], line: str) -> Step:
    name, versions = str(entry.get("step") or "unnamed step"), entry.get("versions")
    return Step(
        number,
        _TITLES.get(name, name),
        "" if line == name else f"{line[:1].upper()}{line[1:]}.",
        str(entry.get("command") or ""),
        versions_text(versions if isinstance(versions, Mapping) else {}),
        tuple(_rows({k: v for k, v in entry.items() if k not in _APART})),
    )


def versions_text(versions: Mapping[str, Any]) -> str:
    """`tiedconv 0.1.0, torch 2.13.0`."""
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _rows(entry: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    """A row for each value; those of an object in it have both names."""
    rows: list[tuple[str, str]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping) and value and not start:
            rows += _rows(value, f"{key}.")
        else:
            rows.append((f"{start}{key}", _text(value)))
    return rows


def _text(value: Any) -> str:
    match value:
        case str():
            text = value
        case None:
            text = "none"
        case float():
            text = f"{value:.6g}"
        case [*items] if items and all(isinstance(item, str | int | float) for item in items):
            text = ", ".join(map(_text, items))
        case _:
            text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} (and {len(text) - LONGEST:,} characters more)"
