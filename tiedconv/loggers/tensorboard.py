"""Figures of a training for TensorBoard."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from tiedconv.errors import MissingExtra, OutputError
from tiedconv.loggers.memory import memory_in_use
from tiedconv.loggers.watchers import Run, Watcher
from tiedconv.training import Baseline, EpochEnd, Event, Metrics, Step

FLUSH_SECONDS = 10


class TensorBoard(Watcher):
    """Writes loss, learning rate, speed and accuracies against the step.

    Args:
        folder: where TensorBoard finds them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.what = f"TensorBoard's folder {folder}"
        self._writer: Any = None

    def check(self, *, force: bool, resume: bool) -> None:
        """Look, before any work, whether it can be written.

        Raises:
            MissingExtra: the package is not installed.
            OutputError: the folder can't be written to, or holds another run already.
        """
        _summary_writer()
        place = self.folder
        while not place.exists() and place != place.parent:
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise OutputError(
                f"The folder {self.folder} can't be written to",
                "TensorBoard would find nothing there",
                "Choose another with --tensorboard",
                code="log-not-writable",
            )
        if not (force or resume) and any(self.folder.glob("events.out.tfevents.*")):
            raise OutputError(
                f"{self.folder} holds a run already",
                "TensorBoard would draw the two as one",
                "Name a folder for each run, or pass --force to hide the former",
                code="log-of-another-run",
            )

    def begin(self, run: Run) -> None:
        # What an earlier part or run wrote from that step on is hidden by TensorBoard.
        first = 0 if run.resumed is None else run.resumed.step + 1
        self._writer = _summary_writer()(
            str(self.folder), purge_step=first, flush_secs=FLUSH_SECONDS
        )

    def see(self, event: Event) -> None:
        match event:
            case Baseline(metrics):
                self._add_metrics(0, metrics)
            case Step(_, step):
                self._add("train/loss", event.loss, step)
                self._add("train/learning_rate", event.lr, step)
                self._add("train/images_per_second", event.images_per_second, step)
                self._add("train/memory_bytes", memory_in_use(), step)
            case EpochEnd(_, loss, metrics, _, step):
                self._add("epoch/loss", loss, step)
                self._add_metrics(step, metrics)
                self._writer.flush()
            case _:
                pass

    def close(self, error: BaseException | None) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add_metrics(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._add(f"validation/{name}", value, step)

    def _add(self, name: str, value: float | None, step: int) -> None:
        if value is not None and math.isfinite(value):
            self._writer.add_scalar(name, value, step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra.of("tensorboard", "tensorboard", "--tensorboard") from None
    return SummaryWriter
