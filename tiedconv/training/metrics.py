"""Names of the validation metrics. Values are fractions from 0 to 1, NaN where undefined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Metrics = Mapping[str, float]
"""Name to value; the first is the one that models are compared by."""

ACCURACY = ("top1", "top5")
AGREEMENT = ("agreement",)
SIMILARITY = ("similarity",)
"""Cosine of the outputs to the teacher's, where they are no cases that agree or not."""

METRIC_TITLES: Mapping[str, str] = {
    "top1": "top-1",
    "top5": "top-5",
    "agreement": "agreement with the teacher",
    "similarity": "cosine to the teacher",
    "ap": "AP",
    "ap50": "AP50",
}
"""How tables and pictures call a metric."""


def metric_names(data: Any) -> tuple[str, ...]:
    """Names of the metrics that a data set is evaluated by.

    Args:
        data: has `metrics`, itself or its `task`; else labels, so the metrics are accuracies.
    """
    task = getattr(data, "task", None)
    names: tuple[str, ...] = getattr(data if task is None else task, "metrics", ACCURACY)
    return names


def primary(metrics: Metrics) -> float | None:
    """The value of the first metric; None if there is none."""
    return next(iter(metrics.values()), None)
