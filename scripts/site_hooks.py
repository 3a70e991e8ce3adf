"""What mkdocs does besides: the README is the home page, and links that leave `docs/` are changed.

A page of `docs/` may link to the rest of the repository (`../examples/...`), as the README does. In
the site a picture from there is copied, and any other such link becomes the path as text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
HOME = "index.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the home page, and the pictures that pages show from outside of `docs/`."""
    readme = (ROOT / "README.md").read_text("utf-8")
    files.append(File.generated(config, HOME, content=readme))
    for page in sorted((ROOT / "docs").glob("*.md")):
        for picture, _, target, _ in LINK.findall(page.read_text("utf-8")):
            if picture and target.startswith("../"):
                path = _outside(page.parent / target)
                content = path.read_bytes()
                files.append(File.generated(config, _copied(path), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend the links of a page."""
    home = page.file.src_uri == HOME
    folder = ROOT if home else ROOT / "docs"
    return LINK.sub(lambda found: _mended(found, folder), markdown)


def _mended(found: re.Match[str], folder: Path) -> str:
    picture, text, target, anchor = found.groups()
    if "://" in target or target.startswith("mailto:"):
        return found[0]
    path = (folder / target).resolve()
    if path.is_relative_to(ROOT / "docs"):
        return f"{picture}[{text}]({path.relative_to(ROOT / 'docs').as_posix()}{anchor or ''})"
    path = _outside(path)
    if picture:
        return f"![{text}]({_copied(path)})"
    name = path.relative_to(ROOT).as_posix()
    return f"`{name}`" if text.strip("/` ") in (name, target) else f"{text} (`{name}`)"


def _outside(path: Path) -> Path:
    """A file or folder of the repository, which must be there."""
    path = path.resolve()
    if not path.is_relative_to(ROOT) or not path.exists():
        raise PluginError(f"a link leads to {path}, which is not in the repository")
    return path


def _copied(path: Path) -> str:
    return "repository/" + path.relative_to(ROOT).as_posix()
