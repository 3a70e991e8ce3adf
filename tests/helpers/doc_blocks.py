"""The code of README and docs: fenced and indented blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("tiedconv", "torchrun", "pip", "python", "make", "hf")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)((?:    .*\n(?:\n(?=    ))?)+)")


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        page: its file.
        line: of the page, from 1.
        language: `python`, `toml`, `sh` for commands, or `text` for what they print.
        text: what it holds.
    """

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        """Page and line."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command."""
        joined = self.text.replace("\\\n", " ")
        lines = [line.removeprefix("$ ") for line in joined.splitlines() if line.strip()]
        return [shlex.split(line, comments=True) for line in lines]


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text("utf-8")
    without = _FENCED.sub(lambda found: re.sub(r"[^\n]", "x", found[0]), text)
    found = [(m.start(), m[1], m[2]) for m in _FENCED.finditer(text)]
    for match in _INDENTED.finditer(without):
        body = re.sub(r"^    ", "", match[1], flags=re.MULTILINE)
        if program_of(body) in PROGRAMS:  # else the continuation of a list
            found.append((match.start(), "sh", body))
    return [
        Block(page, text.count("\n", 0, start) + 1, _language(language, body), body)
        for start, language, body in sorted(found)
    ]


def program_of(text: str) -> str:
    """The program of the first command, `torchrun` of `.venv/bin/torchrun`."""
    words = text.removeprefix("$ ").split()
    return words[0].split("/")[-1] if words else ""


def inline_code(page: Path) -> list[str]:
    """What stands in backticks within the text of a page."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", _FENCED.sub("", page.read_text("utf-8")))


def _language(given: str, body: str) -> str:
    if given:
        return given
    return "sh" if program_of(body) in PROGRAMS else "text"
