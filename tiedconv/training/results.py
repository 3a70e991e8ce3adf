"""What a training run has reached, and what it gives in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tiedconv.training.metrics import ACCURACY, MEASURES, Measure


@dataclass(frozen=True)
class Progress:
    """Where a run stands: plain numbers, kept in the checkpoint.

    Attributes:
        epoch: epochs begun.
        batch: batches of that epoch that are done.
        loss: sum of the losses of its steps.
        losses: how many those are.
        step: optimiser steps done.
        images: training images seen.
        seconds: time taken by finished epochs.
        top1_before: accuracy before training.
        top5_before: likewise.
        top1_teacher: accuracy of the teacher, NaN where that was not measured.
        top5_teacher: likewise.
        val_skipped: validation images that could not be read.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    losses: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    top1_before: float = math.nan
    top5_before: float = math.nan
    top1_teacher: float = math.nan
    top5_teacher: float = math.nan
    val_skipped: int = 0


@dataclass(frozen=True)
class TrainResult:
    """What training did. Accuracies are shares from 0 to 1, on the validation images.

    Attributes:
        top1_before: before training, with the model as it came.
        top5_before: likewise.
        top1: at the end.
        top5: at the end.
        loss: mean training loss of the last epoch.
        epochs: epochs done, the last of which may be partial.
        steps: optimiser steps done.
        images: training images seen, counted each time.
        seconds: time taken, with evaluations, over all resumed parts.
        batch_size: images in a step.
        skipped: different images, of both sets, that could not be read.
        history: for each epoch: epoch, step, loss, top1, top5 (None if not evaluated), seconds.
        top1_teacher: of the teacher, NaN without one.
        top5_teacher: likewise.
    """

    top1_before: float
    top5_before: float
    top1: float
    top5: float
    loss: float
    epochs: int
    steps: int
    images: int
    seconds: float
    skipped: int
    batch_size: int
    history: list[dict[str, Any]]
    top1_teacher: float = math.nan
    top5_teacher: float = math.nan

    @classmethod
    def of(
        cls, at: Progress, history: list[dict[str, Any]], skipped: int, batch_size: int
    ) -> TrainResult:  # fmt: skip
        """The figures of a run that stands at its end."""
        end = history[-1]
        return cls(
            top1_before=at.top1_before, top5_before=at.top5_before, top1=end["top1"],
            top5=end["top5"], loss=end["loss"], epochs=at.epoch, steps=at.step, images=at.images,
            seconds=at.seconds, skipped=skipped, batch_size=batch_size, history=history,
            top1_teacher=at.top1_teacher, top5_teacher=at.top5_teacher,
        )  # fmt: skip

    @property
    def better(self) -> tuple[int, float] | None:
        """An earlier epoch that scored more than the last, the best of them, and its score."""
        last = self.history[-1]
        score = next(m.keys[0] for m in MEASURES if m.keys[0] in last)
        best = max(self.history, key=lambda epoch: epoch[score] or 0.0)
        return (best["epoch"], best[score]) if (best[score] or 0.0) > (last[score] or 0.0) else None


def not_accuracies(result: TrainResult, measure: Measure) -> TrainResult:
    """A result whose figures are no accuracies: NaN in their places, the history by their names."""
    renamed = dict(zip(ACCURACY.keys, measure.keys, strict=False))
    history = [
        {renamed.get(k, k): v for k, v in epoch.items() if k in renamed or k not in ACCURACY.keys}
        for epoch in result.history
    ]
    nan = math.nan
    return replace(
        result, top1_before=nan, top5_before=nan, top1=nan, top5=nan, top1_teacher=nan,
        top5_teacher=nan, history=history,
    )  # fmt: skip
