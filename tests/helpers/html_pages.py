"""An HTML page taken apart, and the laws that every page of a report keeps."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

VOID = frozenset({"meta", "rect", "line", "polyline"})
"""Elements without an end tag on these pages: of HTML, and those of SVG that close themselves."""


@dataclass
class Page(HTMLParser):
    """Its tags and texts.

    Args:
        tags: (name, attributes), in order.
        texts: all that a reader sees.
        cells: texts of cells of tables.
        headings: (level, text).
        rows: of each table, how many cells each row has.
    """

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def of(cls, html: str) -> Page:
        """Take a page apart. Its tags must be balanced."""
        page = cls()
        page.feed(html)
        page.close()
        assert page.open == [], page.open
        return page

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.rows.append([])
        if tag == "tr":
            self.rows[-1].append(0)
        if tag in ("td", "th"):
            self.rows[-1][-1] += 1
            self.cells.append("")
        if len(tag) == 2 and tag[0] == "h" and tag[1].isdigit():
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data
        if self.headings and f"h{self.headings[-1][0]}" in self.open:
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data

    @property
    def text(self) -> str:
        """All texts, in order."""
        return "".join(self.texts)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


def check(html: str) -> Page:
    """The page, which must keep all laws: alone, accessible, in order."""
    page = Page.of(html)
    _stands_alone(page)
    _is_accessible(page)
    return page


def _stands_alone(page: Page) -> None:
    tags = {name for name, _ in page.tags}
    loading = {"script", "link", "img", "image", "iframe", "object", "embed", "base", "use", "form"}
    assert not tags & loading
    targets = {attributes.get("id") for _, attributes in page.tags}
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "style", "background", "xlink:href"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        if "href" in attributes:
            link = attributes["href"] or ""
            assert tag == "a"
            assert link.startswith("#")
            assert link[1:] in targets
    (policy,) = [m["content"] for m in page.named("meta") if "http-equiv" in m]
    assert (policy or "").startswith("default-src 'none'; style-src 'sha256-")
    assert len(page.named("style")) == 1


def _is_accessible(page: Page) -> None:
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert all(text.strip() for _, text in page.headings)
    assert all(len(set(table)) == 1 for table in page.rows), page.rows
    identities = [a["id"] for _, a in page.tags if "id" in a]
    assert len(identities) == len(set(identities))
    for tag, attributes in page.tags:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in identities, name
        if tag == "th":
            assert attributes.get("scope") in ("row", "col"), attributes
        if tag == "svg":
            hidden = attributes.get("aria-hidden") == "true"
            assert hidden or (attributes["role"] == "img" and attributes["aria-labelledby"])
        if "tabindex" in attributes:
            assert attributes.get("role") == "region"
            assert attributes.get("aria-label")
    assert page.named("html") == [{"lang": "en"}]
    assert len(page.named("title")) >= 1
