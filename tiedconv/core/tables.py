"""Tables of figures for terminals and notebooks: what `print(plan)` and a cell with it show."""

from __future__ import annotations

import html
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

_NUMBERS = re.compile(r"\d+(-\d+)*(?=\.)|(?<=\.)\d+(-\d+)*$")  # blocks.3.mlp, layer1.0.conv2.3


@dataclass(frozen=True)
class Table:
    """Figures in rows.

    Args:
        title: above them.
        columns: their titles.
        rows: as many texts each.
        text: columns of words, on the left; the others are figures, on the right.
        below: a sentence below them.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: int = 2
    below: str = ""

    def plain(self) -> str:
        """In aligned columns."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        shown = (
            "  ".join(
                cell.ljust(width) if i < self.text else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        return "\n".join([self.title, *shown, *([self.below] if self.below else [])])

    def html(self) -> str:
        """As an HTML table, which notebooks show."""

        def line(cells: Iterable[str], tag: str) -> str:
            sides = ("left" if i < self.text else "right" for i in range(len(self.columns)))
            inner = "".join(
                f'<{tag} style="text-align:{side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{inner}</tr>"

        rows = "".join(line(row, "td") for row in self.rows)
        head = line(self.columns, "th")
        caption = f"<caption>{html.escape(self.title)}</caption>"
        below = f"<p>{html.escape(self.below)}</p>" if self.below else ""
        return f"<table>{caption}<thead>{head}</thead><tbody>{rows}</tbody></table>{below}"


class Tabular:
    """What is shown as a table by `print` and in notebooks."""

    @abstractmethod
    def table(self) -> Table:
        """Its figures."""

    def __str__(self) -> str:
        return self.table().plain()

    def _repr_html_(self) -> str:
        return self.table().html()


class Named(Protocol):
    """A group of matrices."""

    @property
    def name(self) -> str: ...
    @property
    def scheme(self) -> str: ...


G = TypeVar("G", bound=Named)


def alike(groups: Sequence[G], *, each: bool = False) -> list[tuple[str, str, list[G]]]:
    """Groups that differ in a layer's number alone, under one name with `*` for it.

    Args:
        groups: of a plan or a report.
        each: keep every group by itself.

    Returns:
        (name, scheme, groups), in order.
    """
    merged: dict[tuple[str, str], list[G]] = defaultdict(list)
    for group in groups:
        name = group.name if each else without_numbers(group.name)
        merged[name, group.scheme].append(group)
    return [(name, scheme, members) for (name, scheme), members in merged.items()]


def without_numbers(name: str) -> str:
    """A tensor's or group's name with `*` for the numbers of layers, as `blocks.*.mlp.fc1`."""
    return _NUMBERS.sub("*", name)


class PlanTable(Tabular):
    """The table of a plan."""

    groups: Any
    original: Any
    stored: Any

    def table(self) -> Table:
        """Parameters of its groups, of what is kept, and of the whole model."""
        rows = [
            _row(name, scheme, sum(g.original for g in groups), sum(g.stored for g in groups))
            for name, scheme, groups in alike(self.groups)
        ]
        before, after = (sum(getattr(g, s) for g in self.groups) for s in ("original", "stored"))
        rows.append(_row("all else", "", self.original - before, self.stored - after))
        rows.append(_row("whole model", "", self.original, self.stored))
        title = f"{self.original:,} parameters become {self.stored:,}"
        return Table(title, ("group", "scheme", "original", "stored", "ratio"), tuple(rows))


def _row(name: str, scheme: str, before: int, after: int) -> tuple[str, ...]:
    ratio = f"{100 * after / before:.1f} %" if before else ""
    return name, scheme, f"{before:,}", f"{after:,}", ratio
