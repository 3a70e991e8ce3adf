"""Times of several ways to do one thing, measured in turn: a busy machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 9
LEAST_SECONDS = 1e-3
"""Of what is timed at a time: a shorter run is repeated."""


def in_turn(
    runs: Sequence[Callable[[], object]],
    rounds: int = ROUNDS,
    least: float = LEAST_SECONDS,
    device: torch.device | None = None,
) -> list[float]:
    """The median seconds of each run; each is warmed up first.

    Args:
        runs: in turn in every round.
        rounds: of all runs.
        least: seconds of what is timed at a time.
        device: that the runs work on, to wait for it.
    """
    counts = []
    for run in runs:
        seconds(run, 1, device)
        counts.append(max(1, round(least / max(1e-9, seconds(run, 1, device)))))
    found = [
        [seconds(run, count, device) for run, count in zip(runs, counts, strict=True)]
        for _ in range(rounds)
    ]
    return [statistics.median(times) for times in zip(*found, strict=True)]


def seconds(run: Callable[[], object], count: int, device: torch.device | None = None) -> float:
    """Of a run, the mean of so many."""
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait_for(device)
    return (time.perf_counter() - start) / count


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
