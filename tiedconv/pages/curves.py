"""The curves of a training, as points of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiedconv.loggers import LoggedRun
from tiedconv.loggers.picture import smoothed
from tiedconv.training import METRIC_TITLES

WIDTH, HEIGHT = 360.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 348.0, 14.0, 190.0
POINTS = 300
"""More than a picture of this width can show."""


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where it is, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A line, or one across the whole picture for a single value.

    Args:
        kind: how it is drawn: `raw`, `smooth`, `score`, `before`, `teacher`.
        points: of the picture.
        text: what it is.
    """

    kind: str
    points: tuple[tuple[float, float], ...]
    text: str


@dataclass(frozen=True)
class Curve:
    """A picture of one quantity over the steps of a training.

    Args:
        title: the quantity.
        summary: what the picture shows, for those who can't see it.
        lines: the last one on top.
        across, up: ticks of the two axes.
    """

    title: str
    summary: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


def curves_of(run: LoggedRun) -> tuple[Curve, ...]:
    """Its loss, and its metric where it was evaluated more than once."""
    return tuple(curve for curve in (_losses(run), _scores(run)) if curve is not None)


def _losses(run: LoggedRun) -> Curve | None:
    points = run.course.losses()
    if len(points) < 2:
        return None
    values = [point.loss for point in points]
    smooth = smoothed(values)
    x = _Scale(0, points[-1].step, LEFT, RIGHT)
    y = _Scale.around(smooth, usual(values))
    lines = [Line("raw", _thin(x, y, [p.step for p in points], values), "as logged")]
    if smooth != values:
        lines.append(Line("smooth", _thin(x, y, [p.step for p in points], smooth), "smoothed"))
    return Curve(
        "Training loss",
        f"Training loss over {points[-1].step:,} steps: {smooth[0]:.3g} at the start, "
        f"{smooth[-1]:.3g} at the end.",
        tuple(lines),
        x.ticks("{:,.0f}", whole=True),
        y.ticks("{:.4g}"),
    )


def _scores(run: LoggedRun) -> Curve | None:
    course = run.course
    if run.metric is None or len(course.accuracies) < 2:
        return None
    steps = [step for step, _ in course.accuracies]
    scores = [100 * score for _, score in course.accuracies]
    level = [] if course.teacher is None else [100 * course.teacher]
    x, y = _Scale(0, max(*steps, 1), LEFT, RIGHT), _Scale.around(scores, level, room=0.5)
    title = METRIC_TITLES[run.metric]
    lines = [
        Line("teacher", ((LEFT, y(value)), (RIGHT, y(value))), f"teacher {value:.2f}")
        for value in level
    ]
    if steps[0] == 0:
        before = y(scores[0])
        lines.append(Line("before", ((LEFT, before), (RIGHT, before)), f"before {scores[0]:.2f}"))
    lines.append(Line("score", _thin(x, y, steps, scores), f"after {scores[-1]:.2f}"))
    return Curve(
        f"{title[:1].upper()}{title[1:]}, %",
        f"{title} in percent: " + ", ".join(line.text for line in lines) + ".",
        tuple(lines),
        x.ticks("{:,.0f}", whole=True),
        y.ticks("{:.4g}"),
    )


def usual(values: Sequence[float]) -> tuple[float, float]:
    """The range of all but the wildest hundredth of the values on either side."""
    ordered = sorted(values)
    beyond = len(ordered) // 100
    return ordered[beyond], ordered[-1 - beyond]


@dataclass(frozen=True)
class _Scale:
    """From values to points of the picture, linear."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(
        cls, values: Sequence[float], more: Sequence[float], room: float = 1e-3
    ) -> _Scale:  # fmt: skip
        """A vertical one that has all these values, with some room about them."""
        low, high = min(*values, *more), max(*values, *more)
        margin = max(0.08 * (high - low), room)
        return cls(low - margin, high + margin, BOTTOM, TOP)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1)
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 1)

    def ticks(self, text: str, *, whole: bool = False) -> tuple[Tick, ...]:
        """Up to six round values."""
        step = _round_step((self.high - self.low) / 5)
        step = max(1, round(step)) if whole else step
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        values = [i * step for i in range(first, last + 1)]
        return tuple(Tick(self(value), text.format(value)) for value in values)


def _round_step(least: float) -> float:
    """The next of 1, 2, 5, 10, ..."""
    power = 10.0 ** math.floor(math.log10(max(least, 1e-12)))
    return next(power * n for n in (1, 2, 5, 10) if power * n >= least * (1 - 1e-9))


def _thin(
    x: _Scale, y: _Scale, steps: Sequence[int], values: Sequence[float]
) -> tuple[tuple[float, float], ...]:
    """At most `POINTS` of the points, the last one among them."""
    every = -(-len(steps) // POINTS)
    kept = sorted({*range(0, len(steps), every), len(steps) - 1})
    return tuple((x(steps[i]), y(values[i])) for i in kept)
