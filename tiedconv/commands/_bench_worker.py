"""One model in one runtime, in a process of its own: what `bench` and `verify` measure.

A process apart, as memory can't be told from that of others in one process, and as a runtime keeps
what it once took. The driver sends one JSON object a line, the process answers with one: so
contenders take turns and share whatever else the machine is doing.

    {"load": {...}}             -> {"seconds": ..., "bytes": ...}
    {"run": batch}              -> {"seconds": ...}
    {"peak": true}              -> {"bytes": ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tiedconv.errors import RunError
from tiedconv.utils.memory import peak_rss

RUNTIMES = ("eager", "frozen", "applied", "compiled", "onnx", "pt2")
LOADS = 3
"""A model is loaded so many times; the median counts."""

Runner = Callable[[int], None]


@dataclass(frozen=True)
class BenchTarget:
    """What a process is to run.

    Args:
        file: a compact file, an ONNX file or a pt2 file.
        runtime: one of `RUNTIMES`.
        dense: run a compact file's dense form instead.
        one_copy: tell ONNX Runtime not to pack matrices.
        threads: of the runtime.
        shape: of one image, `(C, H, W)`.
        trust_code: allow the file to name a function that builds the model.
    """

    file: str
    runtime: str
    dense: bool = False
    one_copy: bool = False
    threads: int = 1
    shape: tuple[int, int, int] = (3, 224, 224)
    trust_code: bool = False


class Process:
    """A contender's process, seen from outside."""

    def __init__(self, contender: BenchTarget) -> None:
        self.contender = contender
        environment = {**os.environ, "OMP_NUM_THREADS": str(contender.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tiedconv.commands._bench_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip

    def load(self) -> tuple[float, int]:
        """Seconds until the model is ready, and the bytes of memory it then holds."""
        answer = self._ask({"load": asdict(self.contender)})
        return answer["seconds"], answer["bytes"]

    def run(self, batch: int) -> float:
        """Seconds for one run of so many images."""
        return float(self._ask({"run": batch})["seconds"])

    def peak(self) -> int:
        """The most bytes of memory the process has held, above what it held before loading."""
        return int(self._ask({"peak": True})["bytes"])

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        self._process.terminate()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            answer = json.loads(line)
        except (OSError, ValueError):
            raise RunError(
                f"The process that ran {self.contender.file} ended ({self._last_words()})",
                "It was not measured",
                "Run it with fewer images at a time, or without this runtime",
            ) from None
        if "error" in answer:
            raise RunError(
                f"{self.contender.runtime} can't run {self.contender.file} ({answer['error']})",
                "It was not measured",
                "Leave this runtime out",
            )
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        assert self._process.stderr is not None
        lines = self._process.stderr.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def held_bytes() -> int:
    """Memory of this process that is its own: freed memory is given back first."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    fields = Path("/proc/self/status")
    if fields.exists():
        for line in fields.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return peak_rss() or 0


def main() -> None:
    """Answer questions from standard input until it ends."""
    runner: Runner | None = None
    base = 0
    for line in sys.stdin:
        question = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if "load" in question:
                contender = BenchTarget(**question["load"])
                # Once before: what any model in this runtime costs is not what this one does.
                make_runner(contender)
                base, seconds = held_bytes(), []
                for _ in range(LOADS):
                    runner = None
                    start = time.perf_counter()
                    runner = make_runner(contender)
                    seconds.append(time.perf_counter() - start)
                answer = {"seconds": statistics.median(seconds), "bytes": held_bytes() - base}
            elif "run" in question and runner is not None:
                start = time.perf_counter()
                runner(question["run"])
                answer = {"seconds": time.perf_counter() - start}
            elif "peak" in question:
                answer = {"bytes": (peak_rss() or 0) - base}
        except Exception as error:  # to be told by the driver
            words = str(error).strip().splitlines()
            answer = {"error": words[0] if words else type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def make_runner(contender: BenchTarget) -> Runner:
    """Loads a contender's model; the result runs it on so many random images."""
    torch.set_num_threads(contender.threads)
    make = {"onnx": _onnx, "pt2": _pt2}.get(contender.runtime, _torch)
    return make(contender)


def _torch(contender: BenchTarget) -> Runner:
    from tiedconv.runtime.factored_linear import apply_factors
    from tiedconv.runtime.tie import freeze, untie
    from tiedconv.sources.load import load

    model = load(contender.file, trust_code=contender.trust_code)
    if contender.dense:
        model = untie(model)
    elif contender.runtime == "frozen":
        model = freeze(model)
    elif contender.runtime == "applied":
        apply_factors(model)
    call = torch.compile(model, dynamic=True) if contender.runtime == "compiled" else model

    def run(batch: int) -> None:
        with torch.inference_mode():
            call(torch.zeros(batch, *contender.shape))

    return run


def _pt2(contender: BenchTarget) -> Runner:
    module = torch.export.load(contender.file).module()

    def run(batch: int) -> None:
        with torch.inference_mode():
            module(torch.zeros(batch, *contender.shape))

    return run


def _onnx(contender: BenchTarget) -> Runner:
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = contender.threads
    if contender.one_copy:
        options.add_session_config_entry("session.disable_prepacking", "1")
    session = ort.InferenceSession(contender.file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(batch: int) -> None:
        session.run(None, {name: np.zeros((batch, *contender.shape), np.float32)})

    return run


if __name__ == "__main__":
    main()
