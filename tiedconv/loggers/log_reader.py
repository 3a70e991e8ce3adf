"""Reading a log of a training again, for those who draw it later."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedconv.errors import DataError
from tiedconv.io.json_text import strict_json
from tiedconv.loggers.curve import Course
from tiedconv.loggers.log import FORMAT
from tiedconv.training import METRIC_TITLES

LONGEST = 2**20
"""Bytes of a line: none that was written is as long."""


@dataclass(frozen=True)
class LoggedRun:
    """A training as its log has it.

    Args:
        name: of the log.
        output: name of the file that the training made.
        metric: by which it was evaluated, such as `top1`; None if it was not.
        course: losses and the metric.
    """

    name: str
    output: str
    metric: str | None
    course: Course


def read_log(path: Path) -> LoggedRun:
    """The run of a log that `finetune --log` wrote. A line that a kill cut short is left out.

    Raises:
        DataError: the log can't be read (`log-unreadable`), or it is none (`not-a-log`).
    """
    try:
        with path.open("rb") as file:
            lines = _objects(file)
            first = next(lines, {})
            if first.get("format") != FORMAT or not isinstance(first.get("output"), str):
                raise DataError(
                    f"{path} is not a log of a training",
                    "There is no curve to draw",
                    "Give the file that finetune --log wrote",
                    code="not-a-log",
                )
            metric, course = _course(lines)
    except OSError as error:
        raise DataError(
            f"The log {path} can't be read ({error.strerror or error})",
            "There is no curve to draw",
            "Check its name and permissions",
            code="log-unreadable",
        ) from None
    return LoggedRun(path.name, first["output"], metric, course)


def _objects(file: Any) -> Iterator[Mapping[str, Any]]:
    while line := file.readline(LONGEST):
        try:
            data = strict_json(line.decode("utf-8"))
        except ValueError:
            continue
        if isinstance(data, dict):
            yield data


def _course(lines: Iterator[Mapping[str, Any]]) -> tuple[str | None, Course]:
    course, metric = Course(), None
    for line in lines:
        event, step = line.get("event"), line.get("step")
        if type(step) is not int or step < 0:
            continue
        metric = metric or _metric(line, event)
        score = None if metric is None else _number(line.get(metric))
        loss = _number(line.get("loss"))
        match event:
            case "step" if loss is not None:
                course.add(step, [loss], _number(line.get("lr")) or math.nan)
            case "epoch" if loss is not None and type(line.get("epoch")) is int:
                course.epochs.append((line["epoch"], step, loss))
        if score is not None and event in ("baseline", "epoch"):
            course.accuracies.append((0 if event == "baseline" else step, score))
        elif score is not None and event == "teacher":
            course.teacher = score
    return metric, course


def _metric(line: Mapping[str, Any], event: object) -> str | None:
    known = [name for name in METRIC_TITLES if _number(line.get(name)) is not None]
    return known[0] if known and event in ("baseline", "epoch") else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
