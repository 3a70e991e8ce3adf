"""One model in one runtime, in its own process: what `bench` and `verify` measure.

Its own process, because the memory of one process can't be attributed to several models, and
because a runtime keeps what it once allocated. The driver writes one JSON object per line to the
worker's standard input, the worker answers each with one line on a pipe of its own:

    {"load": {...}}             -> {"seconds": ..., "bytes": ...}
    {"run": batch}              -> {"seconds": ...}
    {"peak": true}              -> {"bytes": ...}

Whatever libraries print goes to a temporary file, which can't fill up as a pipe does.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tiedconv.errors import RunError, first_line
from tiedconv.utils.memory import peak_rss

COMPILED = ("compiled", "compiled-optimized")
OPTIMIZED = ("optimized", "compiled-optimized")
RUNTIMES = ("eager", "cached", "factored", "optimized", *COMPILED)
LOADS = 3
"""How many times a model is loaded; the median is reported."""
TAIL = 4096
"""Bytes of the worker's output that are read for an error."""

Runner = Callable[[int], None]


@dataclass(frozen=True)
class BenchTarget:
    """The model and runtime of one process.

    Args:
        file: a compact file, or an exported one.
        runtime: one of `RUNTIMES`, or a format that is timed.
        dense: run the dense form of a compact file instead.
        lean: tell the runtime to hold one copy of each matrix.
        threads: threads of the runtime.
        shape: shape of one image, `(C, H, W)`; `()` for a model of text alone.
        tokens: of the text beside each image, 0 for a model that takes images alone.
        trust_code: allow the file to name a function that builds the model.
    """

    file: str
    runtime: str
    dense: bool = False
    lean: bool = False
    threads: int = 1
    shape: tuple[int, ...] = (3, 224, 224)
    tokens: int = 0
    trust_code: bool = False


class Process:
    """The process of one target, seen from the driver."""

    def __init__(self, target: BenchTarget) -> None:
        self.target = target
        self._output = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._answers, write_end = os.pipe()
        self._unread = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", __name__, str(write_end)],
                stdin=subprocess.PIPE, stdout=self._output, stderr=self._output,
                env={**os.environ, "OMP_NUM_THREADS": str(target.threads)}, pass_fds=[write_end],
            )  # fmt: skip
        finally:
            os.close(write_end)

    def load(self) -> tuple[float, int]:
        """Seconds until the model is ready, and the bytes of memory it then holds."""
        found = self._ask({"load": asdict(self.target)})
        return found["seconds"], found["bytes"]

    def run(self, batch: int) -> float:
        """Seconds for one run of `batch` images."""
        return float(self._ask({"run": batch})["seconds"])

    def peak(self) -> int:
        """The most bytes of memory the process has held, above what it held before loading."""
        return int(self._ask({"peak": True})["bytes"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._output.close()
        os.close(self._answers)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
            line = self._line()
        except BrokenPipeError:
            line = None
        if line is None:
            raise RunError(
                f"The process that ran {self.target.file} ended ({self._output_tail()})",
                "It was not measured",
                "Run it with fewer images at a time, or without this runtime",
                code="bench-process-ended",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RunError(
                f"{self.target.runtime} can't run {self.target.file} ({answer['error']})",
                "It was not measured",
                "Leave this runtime out",
                code="bench-target-failed",
            ) from _WorkerError(answer["traceback"])
        return answer

    def _line(self) -> bytes | None:
        """The next line of the answers; None if the process has ended."""
        while b"\n" not in self._unread:
            # Not a plain read: a process that the worker has forked may hold the pipe open.
            ready, _, _ = select.select([self._answers], [], [], 0.2)
            chunk = os.read(self._answers, 65536) if ready else None
            if chunk == b"" or (chunk is None and self._process.poll() is not None):
                return None
            self._unread += chunk or b""
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _output_tail(self) -> str:
        """The last line that the ended process printed, or its exit code."""
        self._process.kill()  # it may have closed its pipe and still be running
        code = self._process.wait()
        size = os.fstat(self._output.fileno()).st_size
        # pread leaves the offset, which is shared with the process, where it is.
        tail = os.pread(self._output.fileno(), TAIL, max(0, size - TAIL))
        lines = tail.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {code}"


class _WorkerError(Exception):
    """The traceback of an error in the worker, as the cause of the driver's."""


def held_bytes() -> int:
    """Anonymous memory of this process, after freed memory was returned to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/status")
    if fields.exists():
        for line in fields.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return peak_rss() or 0


def main(answers: int) -> None:
    """Answer the questions on standard input until it ends.

    Args:
        answers: file descriptor to write to.
    """
    worker = _Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # crosses to the driver, which raises it with its traceback
            reason = f"{type(error).__name__}: {first_line(error)}"
            answer = {"error": reason, "traceback": traceback.format_exc()}
        os.write(answers, json.dumps(answer).encode() + b"\n")


class _Worker:
    """The model of a worker, once it is loaded."""

    def __init__(self) -> None:
        self.runner: Runner | None = None
        self.base = 0

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """The figures asked for."""
        if "load" in question:
            return self._load(BenchTarget(**question["load"]))
        if "run" in question:
            assert self.runner is not None
            start = time.perf_counter()
            self.runner(question["run"])
            return {"seconds": time.perf_counter() - start}
        return {"bytes": (peak_rss() or 0) - self.base}

    def _load(self, target: BenchTarget) -> dict[str, Any]:
        # Once before measuring: the first model pays for the runtime itself.
        make_runner(target)
        self.base, seconds = held_bytes(), []
        for _ in range(LOADS):
            self.runner = None
            start = time.perf_counter()
            self.runner = make_runner(target)
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds), "bytes": held_bytes() - self.base}


def make_runner(target: BenchTarget) -> Runner:
    """Load the model of a target; the result runs it on a number of blank images."""
    torch.set_num_threads(target.threads)
    return _torch(target) if target.runtime in RUNTIMES else _format(target)


def _blank(target: BenchTarget, batch: int) -> list[torch.Tensor]:
    """What a target is run on: black images, and the first token of a model that takes text."""
    images, text = (
        torch.zeros(batch, *target.shape),
        torch.zeros(batch, target.tokens, dtype=torch.int64),
    )
    return [images] * bool(target.shape) + [text] * bool(target.tokens)


def _torch(target: BenchTarget) -> Runner:
    from tiedconv.exporters._format import called
    from tiedconv.runtime.factored_linear import apply_factors
    from tiedconv.runtime.optimize import optimize
    from tiedconv.runtime.tie import freeze, untie
    from tiedconv.sources.models import load

    model = load(target.file, trust_code=target.trust_code)
    if target.dense:
        model = untie(model)
    elif target.runtime == "cached":
        model = freeze(model)
    elif target.runtime == "factored":
        apply_factors(model)

    def ready(model: Any) -> Any:
        return torch.compile(model, dynamic=True) if target.runtime in COMPILED else model

    by_batch: dict[int, Any] = {}
    call = ready(model)

    def run(batch: int) -> None:
        if target.runtime in OPTIMIZED and batch not in by_batch:
            given = tuple(_blank(target, batch))
            by_batch[batch] = ready(optimize(copy.deepcopy(model), example=given))
        with torch.inference_mode():
            called(by_batch.get(batch, call), *_blank(target, batch))

    return run


def _format(target: BenchTarget) -> Runner:
    from tiedconv.exporters import all_formats

    form = all_formats()[target.runtime]
    opened = form.opened(Path(target.file), target.threads, lean=target.lean)

    def run(batch: int) -> None:
        opened(*_blank(target, batch))

    return run


if __name__ == "__main__":
    main(int(sys.argv[1]))
