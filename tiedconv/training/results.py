"""State of a training run, and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiedconv.training.metrics import Metrics


@dataclass(frozen=True)
class Progress:
    """How far a run is: plain data, kept in the checkpoint.

    Attributes:
        epoch: epochs started.
        batch: batches of that epoch that are done.
        loss: sum of the losses of its steps.
        losses: number of these steps.
        step: optimiser steps done.
        images: training images seen.
        seconds: time taken by finished epochs.
        before: metrics before training.
        teacher: metrics of the teacher, empty where they were not measured.
        val_skipped: validation images that could not be read.
        kept: the step whose state was kept in the end; None for the last.
        ended: metrics of that state, where it is not the last.
        lr: the peak learning rate, once it is known.
        norms_frozen: whether batch norms keep their statistics in training.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    losses: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    before: Metrics = field(default_factory=dict)
    teacher: Metrics = field(default_factory=dict)
    val_skipped: int = 0
    kept: int | None = None
    ended: Metrics = field(default_factory=dict)
    lr: float = 0.0
    norms_frozen: bool = False


@dataclass(frozen=True)
class TrainResult:
    """What training did. Metrics are fractions from 0 to 1, on the validation images.

    Attributes:
        metrics_before: before training.
        metrics: at the end.
        metrics_teacher: of the teacher, empty where they were not measured.
        loss: mean training loss of the last epoch.
        epochs: epochs done, the last of which may be partial.
        steps: optimiser steps done.
        images: training images seen, counted each time.
        seconds: time taken, with evaluations, over all resumed parts.
        skipped: distinct images, of both sets, that could not be read.
        batch_size: images in a step.
        history: for each epoch: epoch, step, loss, seconds, and each metric by its name (None if
            not evaluated).
        kept_step: after which step the model was as it is now; None where that is the last by
            choice (`keep_best` is off).
        lr: the peak learning rate, as given or found.
    """

    metrics_before: Metrics
    metrics: Metrics
    metrics_teacher: Metrics
    loss: float
    epochs: int
    steps: int
    images: int
    seconds: float
    skipped: int
    batch_size: int
    history: list[dict[str, Any]]
    kept_step: int | None = None
    lr: float = 0.0

    @classmethod
    def of(
        cls, at: Progress, history: list[dict[str, Any]], skipped: int, batch_size: int
    ) -> TrainResult:  # fmt: skip
        """The result of a run at its end."""
        end = history[-1]
        return cls(
            metrics_before=at.before, metrics=at.ended or {name: end[name] for name in at.before},
            metrics_teacher=at.teacher, loss=end["loss"], epochs=at.epoch, steps=at.step,
            images=at.images, seconds=at.seconds, skipped=skipped, batch_size=batch_size,
            history=history, kept_step=at.kept, lr=at.lr,
        )  # fmt: skip

    @property
    def top1_before(self) -> float:
        """Top-1 accuracy before training; NaN where other metrics were measured."""
        return self.metrics_before.get("top1", math.nan)

    @property
    def top5_before(self) -> float:
        """Top-5 accuracy before training; likewise."""
        return self.metrics_before.get("top5", math.nan)

    @property
    def top1(self) -> float:
        """Top-1 accuracy at the end; likewise."""
        return self.metrics.get("top1", math.nan)

    @property
    def top5(self) -> float:
        """Top-5 accuracy at the end; likewise."""
        return self.metrics.get("top5", math.nan)

    @property
    def top1_teacher(self) -> float:
        """Top-1 accuracy of the teacher; NaN where it was not measured."""
        return self.metrics_teacher.get("top1", math.nan)

    @property
    def top5_teacher(self) -> float:
        """Top-5 accuracy of the teacher; likewise."""
        return self.metrics_teacher.get("top5", math.nan)

    def by_name(self) -> dict[str, float]:
        """Every metric under one name: `top1_before`, `top1`, `top1_teacher`, ..."""
        suffixed: Mapping[str, Metrics] = {
            "_before": self.metrics_before, "": self.metrics, "_teacher": self.metrics_teacher,
        }  # fmt: skip
        return {
            name + suffix: value
            for suffix, metrics in suffixed.items()
            for name, value in metrics.items()
        }
