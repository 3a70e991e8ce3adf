"""A picture of a training: its loss and learning rate, and what the model knew before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tiedconv.loggers.curve import Course, Point
from tiedconv.loggers.watchers import Run
from tiedconv.training import METRIC_TITLES
from tiedconv.utils.plotting import new_figure, write_figure

INK, GREY, PALE = "#111827", "#6b7280", "#e5e7eb"
LOSS, RATE, SCORE, TEACHER = "#0f766e", "#d97706", "#1d4ed8", "#7c3aed"
FEW = 60
"""Up to so many losses are dots, and the third of that is not smoothed."""

MARKED = 40
"""Up to so many accuracies have a mark each."""


def draw(course: Course, run: Run, path: Path, *, force: bool = False) -> None:
    """Draw the course of a run.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    scored = bool(course.accuracies)
    figure = new_figure(9, 6.4 if scored else 4.2)
    axes = figure.subplots(2 if scored else 1, 1, sharex=True, squeeze=False)[:, 0]
    _title(figure, run)
    _losses(axes[0], course)
    if scored:
        _accuracies(axes[1], course, f"{METRIC_TITLES[run.start.metrics[0]]}, %")
    last = max([p.step for p in course.points] + [e[1] for e in course.epochs] + [1])
    for axis in axes:
        _plain(axis)
    figure.align_ylabels(axes)
    axes[-1].set_xlim(-0.02 * last if scored else 0, last * 1.02)
    _steps(axes[-1])
    _epochs(axes[0], course)
    write_figure(figure, path, force=force)


def _title(figure: Any, run: Run) -> None:
    percent = 100 * run.stored / max(1, run.original)
    # Two texts in one title: the layout makes room for it.
    figure.suptitle(
        f"{_shortened(run.model)}, {run.scheme}\n", x=0.012, ha="left", fontsize=13,
        fontweight="bold", color=INK, parse_math=False,
    )  # fmt: skip
    figure.text(
        0.012, 0.945 if len(figure.axes) > 1 else 0.918,
        f"{run.stored:,} of {run.original:,} parameters stored ({percent:.1f} %), trained on "
        f"{run.start.images:,} images",
        ha="left", va="top", fontsize=10, color=GREY,
    )  # fmt: skip


def _shortened(name: str, most: int = 44) -> str:
    """The end of a long name, such as that of a file."""
    return name if len(name) <= most else f"\u2026{name[1 - most :]}"


def _losses(axis: Any, course: Course) -> None:
    points = course.losses()
    steps, losses = [p.step for p in points], [p.loss for p in points]
    smooth = smoothed(losses)
    few = len(points) <= FEW
    if smooth == losses:
        axis.plot(steps, losses, color=LOSS, lw=1.8, marker="o", ms=5, label="loss", zorder=3)
    else:
        raw = {"marker": "o", "ms": 3.5, "ls": "none"} if few else {"lw": 0.6}
        axis.plot(steps, losses, color=LOSS, alpha=0.35, label="loss", zorder=2, **raw)
        axis.plot(steps, smooth, color=LOSS, lw=2, label="smoothed", zorder=3)
    axis.set_ylabel("training loss")
    _loss_range(axis, losses, smooth)
    _rates(axis, points)
    legend = axis.figure.legend(
        *axis.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(0.995, 0.998),
        frameon=False, fontsize=9, labelcolor=GREY,
    )  # fmt: skip
    legend.set_in_layout(False)  # it stands beside the title


def _rates(axis: Any, points: Sequence[Point]) -> None:
    """The learning rate, faint and without a scale of its own: its shape and its highest value."""
    known = [p for p in points if math.isfinite(p.lr)]
    # It is reported once for several steps, as that of the last of them.
    points = known[:1] + [p for p, q in pairwise([*known, None]) if p and (not q or p.lr != q.lr)]
    rates = [p.lr for p in points]
    highest = max(rates, default=0)
    if highest <= 0:
        return
    style = {"color": RATE, "lw": 1.2, "alpha": 0.6, "ls": (0, (4, 2))}
    beside = axis.twinx()
    beside.plot([p.step for p in points], rates, **style)
    axis.plot([], [], label=f"learning rate, at most {highest:.2g}", **style)
    beside.set_ylim(0, 1.08 * highest)
    beside.set_yticks([])
    _no_frame(beside)
    axis.set_zorder(beside.get_zorder() + 1)
    axis.patch.set_visible(False)


def _loss_range(axis: Any, losses: Sequence[float], smooth: Sequence[float]) -> None:
    """A few wild steps don't press the rest to the ground; a wide range is logarithmic."""
    low, high = min(losses), max(losses)
    usual = sorted(losses)[int(0.995 * (len(losses) - 1))]
    high = min(high, max(max(smooth), usual) * 1.1) if len(losses) > FEW else high
    if low > 0 and max(smooth) > 20 * min(smooth):
        axis.set_yscale("log")
        axis.set_ylim(low * 0.8, high * 1.6)
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1
        bottom = low - room
        axis.set_ylim(max(0, bottom) if low >= 0 else bottom, high + room)


def _accuracies(axis: Any, course: Course, name: str) -> None:
    steps = [step for step, _ in course.accuracies]
    scores = [100 * score for _, score in course.accuracies]
    marks = {"marker": "o", "ms": 5} if len(steps) <= MARKED else {}
    axis.plot(steps, scores, color=SCORE, lw=1.8, zorder=3, clip_on=False, **marks)
    axis.set_ylabel(name)
    before, after = scores[0] if steps[0] == 0 else None, scores[-1]
    goals = [] if course.teacher is None else [100 * course.teacher]
    low, high = min(scores + goals), max(scores + goals)
    room = max(0.2 * (high - low), 1.0)
    axis.set_ylim(low - room, high + room)
    axis.set_yticks([tick for tick in axis.get_yticks() if max(0, low - room) <= tick <= 100])
    up = before is None or after >= before
    if before is not None:
        axis.axhline(before, color=GREY, lw=1, ls=(0, (4, 2)), zorder=2)
        _note(axis, steps[-1], before, f"before {before:.2f} %", GREY, not up)
    for goal in goals:
        axis.axhline(goal, color=TEACHER, lw=1, ls=(0, (1, 2)), zorder=2)
        _note(axis, steps[0], goal, f"teacher {goal:.2f} %", TEACHER, True, "left")
    if before is None or len(steps) > 1:
        axis.plot(steps[-1], after, color=SCORE, marker="o", ms=6, zorder=4, clip_on=False)
        _note(axis, steps[-1], after, f"after {after:.2f} %", SCORE, up)


def _note(
    axis: Any, step: int, value: float, text: str, colour: str, above: bool, side: str = "right"
) -> None:  # fmt: skip
    """A figure at an end, above or below what it is of."""
    axis.annotate(
        text, (step, value), (4, 7 if above else -7), textcoords="offset points", ha=side,
        va="bottom" if above else "top", color=colour, fontsize=10, fontweight="bold", zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )  # fmt: skip


def _plain(axis: Any) -> None:
    axis.grid(axis="y", color=PALE, lw=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=GREY, labelsize=9, length=0)
    axis.yaxis.label.set_color(INK)
    _no_frame(axis)


def _no_frame(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)


def _steps(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_xlabel("step", color=INK)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axis.spines["bottom"].set(visible=True, color=GREY)


def _epochs(axis: Any, course: Course) -> None:
    """A second scale above, in epochs, where there are several."""
    if len(course.epochs) < 2:
        return
    first = course.epochs[0]
    steps = first[1] / first[0]  # in an epoch
    from matplotlib.ticker import MaxNLocator

    above = axis.secondary_xaxis("top", functions=(lambda x: x / steps, lambda x: x * steps))
    above.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    above.set_xlabel("epoch", color=GREY, fontsize=9)
    above.tick_params(colors=GREY, labelsize=9, length=0)
    above.spines["top"].set_visible(False)


def smoothed(values: Sequence[float]) -> list[float]:
    """Centred means over about a thirtieth of the values; few values stay as they are."""
    reach = len(values) // 60 if len(values) > FEW else len(values) // 20
    if reach == 0:
        return list(values)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    made = []
    for i in range(len(values)):
        # Fewer at the ends, so that they don't lean, but not as few as would be rough.
        half = max(min(reach, i, len(values) - 1 - i), reach // 3)
        low, high = max(0, i - half), min(len(values), i + half + 1)
        made.append((sums[high] - sums[low]) / (high - low))
    return made
