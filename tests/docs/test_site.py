"""The site of the docs: built without a warning, readable at two widths, and it fetches nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import MISSING, browser
from doc_blocks import PAGES, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="needs mkdocs-material, of the extra docs")
    folder = tmp_path_factory.mktemp("site") / "site"
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet: warnings would not be counted.
    words = ["-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    return subprocess.run(
        [sys.executable, *words], cwd=root, capture_output=True, text=True, check=False
    )


def test_each_page_is_there_and_the_readme_is_the_first(site: Path) -> None:
    pages = {"index" if page.name == "README.md" else page.stem for page in PAGES}
    assert {path.stem for path in site.glob("*.html")} == {*pages, "404"}
    home = (site / "index.html").read_text("utf-8")
    assert "Is it for me?" in home
    assert 'href="bytes.html"' in home


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text("utf-8")
        found = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]*)\"", text)
        found += re.findall(r"<link\b[^>]*\bhref=\"([^\"]*)\"[^>]*>", text)
        assert [url for url in found if re.match(r"(https?:)?//", url)] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//", path.read_text("utf-8")), path.name


@pytest.mark.parametrize(
    "link", ["[a](nowhere.md)", "[a](schemes.md#nowhere)", "[a](../nowhere.py)"]
)
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, link: str) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material, of the extra docs")
    for name in ("docs", "scripts", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path)
    page = tmp_path / "docs" / "limits.md"
    page.write_text(page.read_text("utf-8") + f"\n{link}\n", "utf-8")
    assert build(tmp_path, tmp_path / "site").returncode != 0


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "both are there")
def test_pages_fit_a_phone_and_log_nothing(site: Path) -> None:
    with browser() as shown:
        for name in ("index", "tutorial", "cli", "errors", "results"):
            for width in (390, 1200):
                shown.open(site / f"{name}.html", width)
                wide = "document.documentElement.scrollWidth <= window.innerWidth"
                assert shown.run(wide), (name, width)
                assert shown.run("document.querySelector('h1').innerText.length > 3")
        logged = [entry["message"] for entry in shown.console() if entry["level"] == "SEVERE"]
        assert logged == []
