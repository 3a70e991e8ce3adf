"""The course of a training, in few enough points to draw and to keep beside its checkpoints."""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tiedconv.errors import OutputError
from tiedconv.io.atomic import replacing
from tiedconv.io.json_text import json_ready, strict_json
from tiedconv.io.run_dir import CURVE
from tiedconv.loggers.watchers import Run, Watcher
from tiedconv.training import (
    Baseline,
    Checkpointed,
    EpochEnd,
    Event,
    Resumed,
    Step,
    TeacherScore,
    TrainResult,
    primary,
)

MOST = 4000
"""Points kept; from there on neighbours are merged."""


@dataclass(frozen=True)
class Point:
    """A stretch of steps.

    Args:
        step: the last of them.
        loss: their mean loss.
        lr: the learning rate of the last.
        count: of how many steps the loss is known.
    """

    step: int
    loss: float
    lr: float
    count: int = 1


@dataclass
class Course:
    """Losses and accuracies of a run, oldest first.

    Args:
        points: at most `MOST`, each of a stretch of `width` steps.
        epochs: epoch, step and mean loss of each.
        accuracies: step and primary metric, a fraction, before training and after epochs.
        teacher: primary metric of the teacher, where that was measured.
        width: it grows with the run.
    """

    points: list[Point] = field(default_factory=list)
    epochs: list[tuple[int, int, float]] = field(default_factory=list)
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    teacher: float | None = None
    width: int = 1

    def add(self, step: int, losses: Sequence[float], lr: float) -> None:
        """Note the losses of the last steps, up to this one."""
        for each, loss in enumerate(losses, step - len(losses) + 1):
            self._add(Point(each, loss, lr))
        while len(self.points) > MOST:
            points, self.points = self.points, []
            self.width *= 2
            for point in points:
                self._add(point)

    def _add(self, new: Point) -> None:
        last = self.points[-1] if self.points else None
        if last is None or (last.step - 1) // self.width != (new.step - 1) // self.width:
            self.points.append(new)
            return
        count = last.count + new.count
        loss = (last.loss * last.count + new.loss * new.count) / count
        self.points[-1] = Point(new.step, loss, new.lr, count)

    def losses(self) -> list[Point]:
        """The points, and the means of epochs of which no step was reported."""
        known = sorted(point.step for point in self.points)
        means, done = [], 0
        for _, step, loss in self.epochs:
            if self.width == 1 and bisect_right(known, done) >= bisect_right(known, step):
                means.append(Point(step, loss, math.nan, step - done))
            done = step
        return sorted([*self.points, *means], key=lambda point: point.step)

    def until(self, done: Resumed) -> Course:
        """What it was after so many steps and whole epochs."""
        epochs = [e for e in self.epochs if e[0] <= done.epoch]
        evaluated = max((step for _, step, _ in epochs), default=0)
        return Course(
            [p for p in self.points if p.step <= done.step],
            epochs,
            [a for a in self.accuracies if a[0] <= evaluated],
            self.teacher,
            self.width,
        )

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        data = {**vars(self), "points": [(p.step, p.loss, p.lr, p.count) for p in self.points]}
        with replacing(path, force=True) as part:
            part.write_text(json.dumps(json_ready(data), allow_nan=False), "utf-8")

    @classmethod
    def load(cls, path: Path) -> Course:
        """What was saved; empty if that can't be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            data = strict_json(path.read_text("utf-8"))
            return cls(
                [
                    Point(int(s), float(loss), float(lr), int(n))
                    for s, loss, lr, n in data["points"]
                ],
                [(int(e), int(s), float(loss)) for e, s, loss in data["epochs"]],
                [(int(s), float(score)) for s, score in data["accuracies"]],
                None if data["teacher"] is None else float(data["teacher"]),
                max(1, int(data["width"])),
            )
        return cls()


class Curve(Watcher):
    """Keeps the course of a run, over interruptions too.

    Args:
        folder: of the run's checkpoints, where it is kept with each of them.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CURVE
        self.course = Course()
        self.run: Run | None = None

    def begin(self, run: Run) -> None:
        self.run = run
        if run.resumed is not None:
            self.course = Course.load(self.path).until(run.resumed)

    def see(self, event: Event) -> None:
        match event:
            case Baseline(metrics):
                self._score(0, primary(metrics))
            case TeacherScore(metrics):
                score = primary(metrics)
                if score is not None and math.isfinite(score):
                    self.course.teacher = score
            case Step(_, step, losses, lr):
                self.course.add(step, losses, lr)
            case EpochEnd(epoch, loss, metrics):
                self._epoch(epoch, event.step, loss, primary(metrics))
            case Checkpointed():
                # Without it, the picture of a run that is interrupted lacks its first part.
                with contextlib.suppress(OSError, OutputError):
                    self.course.save(self.path)
            case _:
                pass

    def end(self, result: TrainResult) -> None:
        """Epochs are taken from the run's own record: a kill may have come before it was noted."""
        before = [a for a in self.course.accuracies if a[0] == 0]
        self.course.epochs, self.course.accuracies = [], before
        name = next(iter(result.metrics))
        for epoch in result.history:
            self._epoch(epoch["epoch"], epoch["step"], epoch["loss"], epoch[name])

    def _epoch(self, epoch: int, step: int, loss: float, score: float | None) -> None:
        self.course.epochs.append((epoch, step, loss))
        self._score(step, score)

    def _score(self, step: int, score: float | None) -> None:
        if score is not None and math.isfinite(score):
            self.course.accuracies.append((step, score))
