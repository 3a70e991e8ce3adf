"""Figures as tables: Rich for people, Markdown and CSV for documents."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from tiedconv.report import GroupReport, Report

Row = Sequence[str]

GROUP_COLUMNS = (
    "group", "scheme", "rank", "matrices", "original", "stored", "ratio", "bytes", "fit error",
    "views", "computed",
)  # fmt: skip


def table(columns: Sequence[str], rows: Sequence[Row], title: str = "", text: int = 1) -> Table:
    """A Rich table; the first `text` columns are words, the others figures."""
    made = Table(title=title or None, title_justify="left", header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text else "right", no_wrap=i >= text)
    for row in rows:
        made.add_row(*row)
    return made


def markdown(columns: Sequence[str], rows: Sequence[Row], text: int = 1) -> str:
    """A Markdown table."""
    marks = ["---" if i < text else "---:" for i in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Comma-separated values, one head line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue().rstrip("\n")


def group_rows(report: Report, *, each: bool) -> list[Row]:
    """A row for each group; unless `each`, those that differ in a layer's number alone are one."""
    merged: dict[tuple[str, str], list[GroupReport]] = defaultdict(list)
    for g in report.groups:
        key = g.name if each else re.sub(r"\d+(-\d+)*", "*", g.name)
        merged[key, g.scheme].append(g)
    return [_group_row(name, scheme, groups) for (name, scheme), groups in merged.items()]


def total_row(report: Report) -> Row:
    """The sum over the model, kept tensors included."""
    matrices = sum(g.matrices for g in report.groups)
    return (
        "whole model", "", "", str(matrices), f"{report.original:,}", f"{report.stored:,}",
        percent(report.ratio), size(report.tensor_bytes), "", "", "",
    )  # fmt: skip


def kept_row(report: Report) -> Row:
    """Parameters that no scheme touches."""
    return ("kept as it was", "", "", "", f"{report.kept:,}", f"{report.kept:,}", "100.0 %") + (
        "",
    ) * 4


def _group_row(name: str, scheme: str, groups: Sequence[GroupReport]) -> Row:
    original, stored = sum(g.original for g in groups), sum(g.stored for g in groups)
    errors = [g.error for g in groups if g.error is not None]
    ranks = sorted({int(r) for g in groups if g.rank for r in g.rank.split("-")})
    return (
        name + (f"  (x{len(groups)})" if len(groups) > 1 else ""),
        scheme,
        span([str(r) for r in ranks[:1] + ranks[-1:]]),
        str(sum(g.matrices for g in groups)),
        f"{original:,}",
        f"{stored:,}",
        percent(stored / original),
        size(sum(g.size for g in groups)),
        span([f"{e:.3f}" for e in (min(errors), max(errors))]) if errors else "",
        str(sum(g.views for g in groups)),
        str(sum(g.computed for g in groups)),
    )


def span(ends: Sequence[str]) -> str:
    """`a-b`, or `a` if both are the same."""
    return "-".join(dict.fromkeys(ends))


def percent(share: float | None) -> str:
    """A share of one as a percentage."""
    return "" if share is None else f"{100 * share:.1f} %"


def accuracy(share: float | None) -> str:
    """An accuracy as a percentage with two decimals."""
    return "-" if share is None else f"{100 * share:.2f} %"


def size(count: float) -> str:
    """Bytes in decimal units, as disks and downloads count them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def history_lines(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each thing that was done with a model."""
    return [_history_line(entry) for entry in history]


def _history_line(entry: Mapping[str, Any]) -> str:
    if entry.get("step") == "convert":
        recipe = entry.get("recipe") or {}
        rules = "; ".join(
            " ".join(
                [str(r.get("scheme")), *(f"{k}={v}" for k, v in r.items() if _says_something(k, v))]
            )
            for r in recipe.get("rules", [])
        )
        budget = f", params {recipe['params']}" if recipe.get("params") else ""
        return f"converted by {rules}{budget}"
    if entry.get("step") == "finetune":
        return (
            f"fine-tuned on {entry.get('data')} ({entry.get('train_images'):,} images, "
            f"{entry.get('steps'):,} steps, teacher {entry.get('teacher')}): top-1 "
            f"{accuracy(entry.get('top1_before'))} before, {accuracy(entry.get('top1'))} after, on "
            f"{entry.get('val_images'):,} {'held-out ' if entry.get('held_out') else ''}images"
        )
    return str(entry.get("step"))


def _says_something(key: str, value: Any) -> bool:
    return key != "scheme" and value not in ([], ["*"])
