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
    found = _rounds(runs, rounds, least, device)
    return [statistics.median(times) for times in zip(*found, strict=True)]


def ratio_in_turn(
    run: Callable[[], object], base: Callable[[], object], rounds: int = ROUNDS
) -> float:  # fmt: skip
    """The median over rounds of a run's time over another's.

    What slows a machine for longer than a round cancels out.
    """
    found = _rounds([base, run], rounds, LEAST_SECONDS, None)
    return statistics.median(own / other for other, own in found)


def _rounds(
    runs: Sequence[Callable[[], object]], rounds: int, least: float, device: torch.device | None
) -> list[list[float]]:
    """The seconds of each run in each round."""
    counts = []
    for run in runs:
        seconds(run, 1, device)
        counts.append(max(1, round(least / max(1e-9, seconds(run, 1, device)))))
    return [
        [seconds(run, count, device) for run, count in zip(runs, counts, strict=True)]
        for _ in range(rounds)
    ]


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
