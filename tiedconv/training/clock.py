"""How fast training goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times the steps of an epoch.

    Args:
        step: the first of them.
    """

    def __init__(self, step: int) -> None:
        self.first_step, self.images = step, 0
        self.start = self.read = self.reported = time.perf_counter()

    @property
    def unread(self) -> float:
        """Seconds since the losses were read."""
        return time.perf_counter() - self.read

    @property
    def untold(self) -> float:
        """Seconds since progress was reported."""
        return self.read - self.reported

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within it time does not count."""
        before = time.perf_counter()
        yield
        passed = time.perf_counter() - before
        self.start, self.read = self.start + passed, self.read + passed
        self.reported += passed

    def read_now(self) -> None:
        """Notes that the losses were read, for which the device was waited for."""
        self.read = time.perf_counter()

    def steps_within(self, seconds: float, step: int) -> int:
        """How many steps a time has room for, after `step`, at the throughput so far."""
        return int(seconds * (step - self.first_step) / max(self.read - self.start, 1e-9))

    def report(self, step: int, steps: int) -> tuple[float, float]:
        """Images a second, and the seconds that are left; notes that they were reported."""
        self.reported = self.read
        passed = max(self.read - self.start, 1e-9)
        return self.images / passed, passed / (step - self.first_step) * (steps - step)
