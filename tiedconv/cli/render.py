"""Figures as tables: Rich for people, Markdown and CSV for documents."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from tiedconv.commands.history import history_lines as history_lines
from tiedconv.commands.history import preparation as preparation
from tiedconv.utils.figures import accuracy as accuracy
from tiedconv.utils.figures import counted as counted
from tiedconv.utils.figures import duration as duration
from tiedconv.utils.figures import milliseconds as milliseconds
from tiedconv.utils.figures import percent as percent
from tiedconv.utils.figures import size as size
from tiedconv.utils.figures import span as span
from tiedconv.utils.figures import three_digits as three_digits

if TYPE_CHECKING:
    from tiedconv.commands.report import GroupReport, Report
    from tiedconv.sources import Source

Row = Sequence[str]

GROUP_COLUMNS = (
    "group", "scheme", "rank", "matrices", "original", "stored", "ratio", "bytes", "fit error",
    "views", "computed",
)  # fmt: skip


# What a narrow terminal goes without, the least needed first.
_LEAST_NEEDED = ("matrices", "computed", "views", "bytes", "scheme")
_GAP = 2  # spaces between columns

LEGEND = (
    "Views are stored tensors read in another shape, free at run time; computed weights take "
    "arithmetic, which freeze() does once for inference."
)
FIT_ERROR = "The fit error is the relative distance from the original weights before fine-tuning."
FIT_ERROR_ON_IMAGES = (
    "The fit error is relative, weighted by its effect on the outputs for the images: at 0 no "
    "output changes."
)


def table(columns: Sequence[str], rows: Sequence[Row], text: int = 1, total: bool = False) -> Table:
    """A Rich table, of which at most the first column wraps.

    Args:
        columns: names.
        rows: cells.
        text: the number of columns of text; the others are figures.
        total: whether the last row is the sum of the others.
    """
    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0),
        header_style="bold",
    )  # fmt: skip
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < text else "right", no_wrap=i > 0)
    for i, row in enumerate(rows):
        last = total and i == len(rows) - 1
        made.add_row(*map(Text, row), style="bold" if last else None)
    return made


def fitting(
    columns: Sequence[str], rows: Sequence[Row], room: int | None
) -> tuple[Sequence[str], Sequence[Row]]:
    """The columns that are not empty, and of these as many as there is room for.

    Args:
        columns: names.
        rows: cells.
        room: width in characters, None for no limit.
    """
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    for name in _LEAST_NEEDED:
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in kept]
        if room is None or sum(widths) + _GAP * len(widths) <= room:
            break
        kept = [i for i in kept if columns[i] != name]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def markdown(columns: Sequence[str], rows: Sequence[Row], text: int = 1) -> str:
    """A Markdown table."""
    marks = ["---" if i < text else "---:" for i in range(len(columns))]
    lines = [columns, marks, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Comma-separated values, one head line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([columns, *rows])
    return buffer.getvalue().rstrip("\n")


def exact_rows(report: Report) -> list[Sequence[object]]:
    """The rows of `group_rows`, `kept_row` and `total_row`, as plain numbers for a program."""
    rows: list[Sequence[object]] = [
        (g.name, g.scheme, g.rank, g.matrices, g.original, g.stored, g.ratio, g.size, g.error,
         g.views, g.computed)
        for g in report.groups
    ]  # fmt: skip
    matrices = sum(g.matrices for g in report.groups)
    kept, total = kept_row(report)[0], total_row(report)[0]
    return [
        *rows,
        (kept, "", "", "", report.kept, report.kept, 1.0, "", "", "", ""),
        (total, "", "", matrices, report.original, report.stored, report.ratio,
         report.tensor_bytes, "", "", ""),
    ]  # fmt: skip


def without_common_start(rows: Sequence[Row], least: int = 16) -> tuple[str, Sequence[Row]]:
    """A start that all groups' names share, if it is long, and the rows without it.

    Args:
        rows: of groups, then what was kept, then the whole.
        least: length in characters from which it is worth it.
    """
    parts = zip(*(row[0].split(".")[:-1] for row in rows[:-2]), strict=False)
    same = itertools.takewhile(lambda at: len(set(at)) == 1, parts)
    start = "".join(f"{at[0]}." for at in same)
    if len(start) < least or len(rows) < 4:
        return "", rows
    return start, [[row[0].removeprefix(start), *row[1:]] for row in rows]


def group_rows(report: Report, *, each: bool) -> list[Row]:
    """A row for each group; unless `each`, those that differ in a layer's number alone are one."""
    return [_group_row(*merged) for merged in report.merged(each=each)]


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
        name + (f" (x{len(groups)})" if len(groups) > 1 else ""),
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


def skipped(count: int) -> str:
    """How many images could not be read."""
    what = "1 image could not be read and was" if count == 1 else (
        f"{count:,} images could not be read and were"
    )  # fmt: skip
    return f"{what} skipped."


def other_size(native: tuple[int, int] | None, size: int) -> str:
    """A warning where a model was built for another size than images are prepared at; else ""."""
    if native is None or native == (size, size):
        return ""
    height, width = native
    remedy = f": --image-size {height} may be meant" if height == width else ""
    return (
        f"Warning: the model was built for {height} x {width} pixels, and images are prepared at "
        f"{size} x {size}{remedy}."
    )


def against_original(found: Report) -> str:
    """The bytes of a file, against those of the original's tensors."""
    share = percent(found.file_bytes / max(1, found.original_bytes))
    original = f"{size(found.original_bytes)} ({found.original_dtype})"
    return f"{size(found.file_bytes)}, {share} of the original's {original}"


def precision(found: Report) -> str:
    """How many parameters are stored as integers, and in how many bits."""
    share = percent(found.integers / max(1, found.stored))
    bits = 8 * found.tensor_bytes / max(1, found.stored)
    return (
        f"{found.integers:,} of them ({share}) are stored as integers; with scales, and what stays "
        f"float16, a parameter takes {bits:.2f} bits on average. Loaded, its tensors take "
        f"{size(found.memory_bytes)} of memory, and {size(found.frozen_bytes)} once "
        "tiedconv.freeze has computed the weights."
    )


def work(found: Report) -> str:
    """What a forward pass takes."""
    text = "FLOPs are unchanged: every weight keeps its shape when it is used."
    if found.macs is not None:
        text = multiply_adds(found.macs)
    if found.factored_flops > 1.05:
        text += (
            f" Factored, for the least memory, converted layers take "
            f"{found.factored_flops:.2f} times as many multiplications."
        )
    return text


def multiply_adds(macs: Mapping[str, Any]) -> str:
    """Those of a forward pass, before and after."""
    before, after = macs["original"], macs["converted"]
    inputs = shapes(macs["inputs"])
    if after == before:
        return (
            f"A forward pass still takes {amount(before)} multiply-adds ({inputs}): every weight "
            "keeps its shape when it is used."
        )
    return (
        f"A forward pass takes {amount(after)} multiply-adds ({percent(after / before)} of "
        f"{amount(before)}; {inputs}) where factors are applied: in ONNX files, or after "
        "tiedconv.apply_factors(model, cache=True)."
    )


def latency(found: Mapping[str, Any]) -> str:
    """The time of a forward pass: before, as predicted and as measured."""
    original, predicted = found["original_ns"], found["predicted_ns"]
    text = (
        f"Time of a forward pass: {milliseconds(original)}, predicted {milliseconds(predicted)} "
        f"({predicted / original:.2f}x)"
    )
    if (measured := found["measured"]) is not None:
        text += (
            f", measured {measured['ratio']:.2f}x ({measured['low']:.2f} to {measured['high']:.2f}"
            f"; {milliseconds(1e9 * measured['seconds'])})"
        )
    return f"{text}. Times of {found['table']}."


def shapes(inputs: Sequence[Sequence[int]]) -> str:
    """Of inputs, such as `3 x 224 x 224`, without a batch of one."""
    each = (shape[1:] if list(shape[:1]) == [1] else shape for shape in inputs)
    return ", ".join(" x ".join(map(str, shape)) for shape in each if math.prod(shape) > 1)


def amount(count: float) -> str:
    """A number with three digits, in thousands (k), millions (M), billions (G) or trillions (T)."""
    power = min(4, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}".rstrip()


def calibrated(figures: Mapping[str, Any]) -> str:
    """What a calibration measured."""
    from tiedconv.commands.measured import measured

    before, after = (max(0.0, figures[key]) for key in ("kl_before", "kl_after"))
    random = "random " if figures.get("random") else ""
    text = (
        f"Calibrated on {counted(figures['images'], f'{random}image')} without labels, effort "
        f"{figures['effort']}: "
        f"KL divergence of the outputs {before:.3g}"
    )
    if after != before:
        text += f" -> {after:.3g}"
    # A single image is fitted to and measured on.
    text += " nats" + (f", on held-out {random}images." if figures["images"] > 1 else ".")
    text += "".join(f" {each.sentence}" for each in measured([{"calibration": figures}]))
    return text + (f" {skipped(figures['skipped'])}" if figures["skipped"] else "")


def weights_part(source: Source) -> str:
    """Which weights of a file were taken."""
    part = source.weights_part or ""
    kind = "the averaged weights (EMA)" if "ema" in part else "the weights"
    return f"Taken of {source.weights_name}: {kind} under {part}."


def symmetry_lines(entry: Mapping[str, Any]) -> list[str]:
    """What a conversion's record says of the symmetries: proven and used, and refused."""
    found = entry.get("symmetries") or {}
    lines = []
    for key, text in (
        ("used", "Symmetries used, which change no output"),
        ("refused", "Symmetries not used, as they would change outputs or could not be tried"),
    ):
        if parts := [
            f"{name} ({counted(len(blocks), 'block')})"
            for name, blocks in found.get(key, {}).items()
        ]:
            lines.append(f"{text}: {', '.join(parts)}.")
    lines += [
        f"Relative error of {cost['block']}: {percent(cost['error'])} without "
        f"{' and '.join(cost['symmetries'])}, {percent(cost['error_if_exact'])} with."
        for cost in found.get("cost", ())
    ]
    return lines
