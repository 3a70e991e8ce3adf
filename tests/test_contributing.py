"""docs/contributing.md and docs/extending.md name what is there, and all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_architecture import IMPORTS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text("utf-8")
EXTENDING = (ROOT / "docs" / "extending.md").read_text("utf-8")


def section(title: str) -> str:
    """The text below a heading, up to the next one of its level."""
    level = title.split(" ")[0]
    found = re.search(rf"^{re.escape(title)}$(.*?)(?=^{level} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def test_the_map_lists_exactly_the_folders_those_that_are_imported_first() -> None:
    listed = re.findall(r"^\| `tiedconv/(\w+)/` \|", section("## The map"), re.MULTILINE)
    folders = {p.parent.name for p in (ROOT / "tiedconv").glob("*/__init__.py")}
    assert len(listed) == len(set(listed))
    assert set(listed) == folders
    for folder, imported in IMPORTS.items():
        above = listed[: listed.index(folder)] if folder in listed else listed
        assert set(imported.split()) & folders <= set(above), folder


def test_questions_have_one_answer_each() -> None:
    row = r"^\| (.*\?) \| [^|`]*`([^`]+)`[^|`]*\|$"
    rows = re.findall(row, section("## Eleven questions"), re.MULTILINE)
    assert len(rows) == 11
    assert len({question for question, _ in rows}) == len({answer for _, answer in rows}) == 11
    assert all((ROOT / answer).is_file() for _, answer in rows)


def test_every_path_named_is_there() -> None:
    pages = PAGE + EXTENDING
    paths = re.findall(r"`((?:tiedconv|tests|docs|benchmarks)/[\w./]*)`", pages)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([\w./]+)\)", pages)
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


@pytest.mark.parametrize(
    ("kind", "folder"),
    [
        ("Schemes", "schemes"),
        ("Families", "families"),
        ("Exporters", "exporters"),
        ("Layouts of images", "data/layouts"),
        ("Kinds of output", "outputs"),
        ("Tasks", "tasks"),
    ],
)
def test_each_file_of_an_open_folder_is_named(kind: str, folder: str) -> None:
    entry = re.search(rf"^- {kind}[^\n]*?: (.*?)(?=^- |^$)", EXTENDING, re.MULTILINE | re.DOTALL)
    assert entry is not None
    names = {path.stem for path in (ROOT / "tiedconv" / folder).glob("[!_]*.py")} - {"inspect"}
    assert set(re.findall(r"`(\w+)`", entry[1])) == names


def test_the_family_that_is_shown_is_the_file() -> None:
    shown = re.findall(r"^```python\n(.*?)^```$", EXTENDING, re.MULTILINE | re.DOTALL)
    file = (ROOT / "tiedconv" / "families" / "mbconv.py").read_text("utf-8")
    assert file in shown
    assert file.count("\n") < 100


def test_docs_api_is_what_the_docstrings_say() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "api_docs.py"), "--check"]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
