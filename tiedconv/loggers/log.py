"""A log of a training: one JSON object a line, each written at once."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tiedconv.errors import OutputError
from tiedconv.io.atomic import check_output, replacing
from tiedconv.io.json_text import json_ready
from tiedconv.loggers.memory import memory_in_use
from tiedconv.loggers.watchers import Run, Watcher
from tiedconv.training import (
    AGREEMENT,
    Baseline,
    Checkpointed,
    EpochEnd,
    Event,
    Interrupted,
    KeptBest,
    RateFound,
    Resumed,
    Skipped,
    Step,
    TeacherScore,
    TrainResult,
)

FORMAT = "tiedconv-log-1"


class JsonLog(Watcher):
    """Writes what happens to a file of JSON lines.

    A resumed run appends to the log of its first part; lines beyond the step that it resumes from
    are dropped. So each step is there once, and `seconds` leave out the pause.

    Args:
        path: of the log.
        output: the file that the training makes, which identifies the run.
    """

    def __init__(self, path: Path, output: Path) -> None:
        self.path, self.output = path, output.name
        self.what = f"The log {path}"
        self._file: io.FileIO | None = None
        self._metrics: tuple[str, ...] = ()
        self._start, self._before, self._step = time.perf_counter(), 0.0, 0

    def check(self, *, force: bool, resume: bool) -> None:
        """Look, before any work, whether the log can be written.

        Raises:
            OutputError: it can't, or it exists, or it is not the log to append to.
        """
        check_output(self.path, force=force or resume, option="--log")
        if not self.path.exists():
            return
        try:
            with self.path.open("rb+") as file:
                first = file.readline(2**20) if resume and not force else b""
        except OSError as error:
            raise OutputError(
                f"The log {self.path} can't be written to ({error.strerror})",
                "Nothing was done",
                "Choose another with --log, or change its permissions",
                code="log-not-writable",
            ) from None
        if first and _object(first).get("output") != self.output:
            raise OutputError(
                f"{self.path} is not the log of a training of {self.output}",
                "It was left as it is",
                "Choose another with --log, or pass --force to replace it",
                code="log-of-another-run",
            )

    def begin(self, run: Run) -> None:
        self._metrics = run.start.metrics
        if run.resumed is not None and self.path.exists():
            self._keep(run.resumed)
            self._file = self.path.open("ab", buffering=0)
        else:
            self._file = self.path.open("wb", buffering=0)
        self._step = run.resumed.step if run.resumed is not None else 0
        self._start = time.perf_counter()
        self._write(
            "start", format=FORMAT, time=_now(), output=self.output, model=run.model,
            scheme=run.scheme, original=run.original, stored=run.stored,
            labels=self._metrics != AGREEMENT, steps=run.start.steps,
            epochs=run.start.epochs, images=run.start.images, **run.settings,
        )  # fmt: skip

    def see(self, event: Event) -> None:
        self._step = getattr(event, "step", self._step)
        match event:
            case RateFound(lr, tried, start):
                losses = {f"{rate:g}": loss for rate, loss in tried.items()}
                self._write("rate", lr=lr, held_out_loss=start, tried=losses)
            case KeptBest(kept, _, start, loss):
                self._write("kept", kept_step=kept, held_out_before=start, held_out_after=loss)
            case Resumed(epoch, _):
                self._write("resumed", epoch=epoch)
            case Baseline(metrics, loss):
                self._write("baseline", validation_loss=loss, **metrics)
            case TeacherScore(metrics):
                self._write("teacher", **metrics)
            case Step():
                self._write(
                    "step", epoch=event.epoch, loss=event.loss, lr=event.lr,
                    images_per_second=event.images_per_second, eta_seconds=event.eta_seconds,
                    memory=memory_in_use(),
                )  # fmt: skip
            case EpochEnd(epoch, loss, metrics, seconds):
                values = {**dict.fromkeys(self._metrics), **metrics}  # None if not evaluated
                self._write("epoch", epoch=epoch, loss=loss, epoch_seconds=seconds, **values)
            case Checkpointed(path):
                self._write("checkpoint", path=path)
            case Skipped(count, example):
                self._write("skipped", count=count, example=example)
            case _:
                pass  # an evaluation's progress is not logged

    def end(self, result: TrainResult) -> None:
        self._step = result.steps
        self._write(
            "end", time=_now(), epochs=result.epochs, images=result.images,
            train_seconds=result.seconds, skipped=result.skipped, loss=result.loss,
        )  # fmt: skip

    def close(self, error: BaseException | None) -> None:
        if self._file is None:
            return
        try:
            if isinstance(error, KeyboardInterrupt):
                signum = error.signum if isinstance(error, Interrupted) else None
                self._write("interrupted", time=_now(), signal=signum)
            elif error is not None:
                self._write("failed", time=_now(), error=str(error))
        finally:
            self._file.close()

    def _write(self, event: str, **figures: Any) -> None:
        if self._file is None:
            return
        seconds = self._before + time.perf_counter() - self._start
        line = {"event": event, "step": self._step, "seconds": round(seconds, 3), **figures}
        data = (json.dumps(json_ready(line), allow_nan=False) + "\n").encode()
        whole = self._file.tell()
        try:
            while data:  # an unbuffered file may take a part
                data = data[self._file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)  # so that what is there stays valid
            raise

    def _keep(self, done: Resumed) -> None:
        """Drop what was logged beyond a state, and a line of which a kill left a part.

        A state may be of an epoch's last step, and older than the end of that epoch.
        """
        with replacing(self.path, force=True) as kept, kept.open("wb") as file:
            for line, data in _lines(self.path):
                beyond = data.get("event") == "epoch" and data.get("epoch", 0) > done.epoch
                if data.get("step", done.step + 1) <= done.step and not beyond:
                    file.write(line)
                    self._before = max(self._before, float(data.get("seconds", 0.0)))


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        yield from ((line, _object(line)) for line in file if line.endswith(b"\n"))


def _object(line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
