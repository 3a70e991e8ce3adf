"""Pages that are made from the source are current, and pages written by hand agree with them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from doc_blocks import PAGES, ROOT

DOCS = ROOT / "docs"
EXPECTED = re.compile(r"(?:error_code=|raises\(\w+, )\"([a-z0-9]+(?:-[a-z0-9]+)+)\"")


@pytest.mark.parametrize("name", ["cli", "error"])
def test_it_is_what_the_source_says(name: str) -> None:
    made = importlib.import_module(f"{name}_docs")
    assert made.PATH.read_text("utf-8") == made.page(), f"run python scripts/{name}_docs.py"


def listed() -> list[re.Pattern[str]]:
    """The codes of docs/errors.md; `…` stands for any word."""
    codes = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text("utf-8"), re.MULTILINE)
    return [re.compile(re.escape(code).replace("…", "[a-z]+")) for code in codes]


def test_every_code_that_a_test_expects_is_listed() -> None:
    known = listed()
    tests = "".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    codes = set(EXPECTED.findall(tests))
    assert len(codes) > 150
    assert {code for code in codes if not any(k.fullmatch(code) for k in known)} == set()


def test_troubleshooting_explains_codes_that_exist() -> None:
    known = listed()
    text = (DOCS / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[a-z`, -]+`) \| ", text, re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    assert len(codes) > 25
    assert [code for code in codes if not any(k.fullmatch(code) for k in known)] == []


def test_each_page_is_linked_from_the_readme_and_in_the_navigation() -> None:
    readme, site = ((ROOT / name).read_text("utf-8") for name in ("README.md", "mkdocs.yml"))
    pages = [page.name for page in PAGES if page.name != "README.md"]
    assert [name for name in pages if f"(docs/{name})" not in readme] == []
    assert [name for name in pages if f": {name}" not in site] == []


def test_words_of_the_glossary_are_in_order() -> None:
    words = re.findall(r"^\| \*\*(.*?)\*\* \|", (DOCS / "glossary.md").read_text("utf-8"), re.M)
    assert words == sorted(words, key=str.lower)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
