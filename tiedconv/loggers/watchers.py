"""Loggers of a training: each gets its events, and none can end it by failing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from tiedconv.commands.report import Report
from tiedconv.errors import TiedconvError
from tiedconv.training import (
    ClassesMatched,
    Detecting,
    Event,
    ImagesPrepared,
    Resumed,
    Start,
    TrainResult,
    Unlabelled,
)


@dataclass(frozen=True)
class Run:
    """What a training is about.

    Args:
        model: the spec that the model was made from.
        scheme: names of the schemes in it.
        original: parameters of the original model.
        stored: parameters stored.
        settings: whatever else is to be noted: data, options, versions, ...
        start: how much is to be done.
        resumed: what was done before; None for a run that begins.
    """

    model: str
    scheme: str
    original: int
    stored: int
    settings: Mapping[str, Any]
    start: Start
    resumed: Resumed | None = None

    @classmethod
    def of(
        cls, report: Report, settings: Mapping[str, Any], start: Start, resumed: Resumed | None
    ) -> Run:  # fmt: skip
        """The run that trains the file of this report."""
        schemes = " + ".join(dict.fromkeys(group.scheme for group in report.groups))
        return cls(
            report.model, schemes, report.original, report.stored, settings, start, resumed
        )  # fmt: skip


class Watcher:
    """Records the events of a training. Any method may raise OSError."""

    what = "record"

    def begin(self, run: Run) -> None:
        """Called once, before all else."""

    def see(self, event: Event) -> None:
        """Called with each event that follows."""

    def end(self, result: TrainResult) -> None:
        """Called when all went well."""

    def close(self, error: BaseException | None) -> None:
        """Called last, whatever happened; perhaps before anything began."""


class Watchers:
    """Passes events on to watchers; one that fails is reported once and then skipped.

    Whether a run resumes from a checkpoint is known only after its first event, so they begin
    with the second.

    Args:
        watchers: get the events.
        report: of the file that is trained; called when the run begins.
        settings: to be noted of the run.
        warn: called with a line about a watcher that fails.
    """

    def __init__(
        self,
        watchers: list[Watcher],
        report: Callable[[], Report],
        settings: Mapping[str, Any],
        warn: Callable[[str], None],
    ) -> None:
        self.watchers, self._report, self._settings, self._warn = watchers, report, settings, warn
        self._start: Start | None = None
        self._begun = False

    def __call__(self, event: Event) -> None:
        match event:
            case Unlabelled() | Detecting() | ClassesMatched() | ImagesPrepared():
                pass  # `Start` names the metrics
            case Start():
                self._start = event
            case _:
                self._begin(event)
                self._each(lambda watcher: watcher.see(event))

    def end(self, result: TrainResult) -> None:
        """The run has ended well, and its file is written."""
        self._each(lambda watcher: watcher.end(result))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._each(lambda watcher: watcher.close(error))

    def _begin(self, event: Event) -> None:
        if self._begun or self._start is None or not self.watchers:
            return
        self._begun = True
        resumed = event if isinstance(event, Resumed) else None
        run = Run.of(self._report(), self._settings, self._start, resumed)
        self._each(lambda watcher: watcher.begin(run))

    def _each(self, call: Callable[[Watcher], None]) -> None:
        for watcher in list(self.watchers):
            try:
                call(watcher)
            except (OSError, TiedconvError) as error:
                self.watchers.remove(watcher)
                with contextlib.suppress(OSError):
                    watcher.close(None)
                reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
                self._warn(
                    f"{watcher.what} can't be written: {reason}. The run continues without it."
                )
