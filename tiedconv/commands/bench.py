"""The verb `bench`: what a compact file costs to run, beside its dense form.

Each contender runs in a process of its own, and they take turns: whatever else the machine does
hits all of them alike, so ratios hold where seconds don't. A ratio is taken within each turn; its
median and the middle 80 % are told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands.export import export, images_for
from tiedconv.errors import MissingExtra, RunError, UserError
from tiedconv.exporters import all_formats
from tiedconv.exporters.onnx import write_dense
from tiedconv.runtime.tie import untie
from tiedconv.sources.load import load
from tiedconv.utils.plotting import new_figure, write_figure

DENSE = "dense"
OnTurn = Callable[[int, int], None]


@dataclass(frozen=True)
class Timing:
    """Runs of one contender at one batch size.

    Args:
        batch: images at a time.
        seconds: median for one run.
        ratio: to the dense form in the same runtime: median over turns; None for it itself.
        low, high: between which the middle 80 % of turns lie.
    """

    batch: int
    seconds: float
    ratio: float | None
    low: float | None
    high: float | None

    @property
    def images_per_second(self) -> float:
        """Throughput."""
        return self.batch / self.seconds


@dataclass(frozen=True)
class Measured:
    """One contender.

    Args:
        runtime: `eager`, `frozen`, `applied`, `compiled`, `onnx`, or `onnx-lean` (factors applied
            wherever it can be done, one copy of each matrix).
        model: `compact` or `dense`.
        file_bytes: of what is loaded.
        load_seconds: until the model is ready, the runtime itself loaded before.
        held_bytes: memory of the process that the loaded model takes.
        timings: by batch size.
    """

    runtime: str
    model: str
    file_bytes: int
    load_seconds: float
    held_bytes: int
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class Bench:
    """What `bench` found.

    Args:
        file: the compact file.
        rows: contenders, each compact one after the dense form that it is compared with.
        rounds: turns for each batch size.
        threads: of each runtime.
        device: the processor.
        left_out: runtimes that could not be measured, and why.
    """

    file: Path
    rows: tuple[Measured, ...]
    rounds: int
    threads: int
    device: str
    left_out: tuple[tuple[str, str], ...] = ()


def bench(
    file: str | Path,
    *,
    runtimes: Sequence[str] = ("eager", "onnx"),
    batches: Sequence[int] = (1, 8),
    rounds: int = 20,
    threads: int = 1,
    trust_code: bool = False,
    on_turn: OnTurn | None = None,
) -> Bench:
    """Measure load time, memory, latency and throughput of a compact file against its dense form.

    Args:
        file: a compact file.
        runtimes: `eager` (with `frozen` and `applied`), `compiled`, `onnx` (with `onnx-lean`).
        batches: images at a time.
        rounds: turns for each batch size, at least 3.
        threads: of each runtime.
        trust_code: allow the file to name a function that builds the model.
        on_turn: called with (turns done, turns in all).

    Raises:
        UserError: unknown runtime, or one whose package is missing.
        RunError: a process ended, or could not run the model.
    """
    _check(runtimes, batches, rounds)
    model = load(file, trust_code=trust_code)
    images = images_for(model)
    shape = (images.shape[1], images.shape[2], images.shape[3])
    with tempfile.TemporaryDirectory() as folder:
        plain = _contenders(Path(file), runtimes, Path(folder), model, images, trust_code)
        listed = [
            (runtime, kind, dataclasses.replace(c, threads=threads, shape=shape))
            for runtime, kind, c in plain
        ]
        rows, left_out = _measure(listed, batches, rounds, on_turn)
    return Bench(Path(file), tuple(rows), rounds, threads, _device(), tuple(left_out))


Listed = tuple[str, str, BenchTarget]


def _contenders(
    file: Path, runtimes: Sequence[str], folder: Path, model: torch.nn.Module, images: torch.Tensor,
    trust_code: bool,
) -> list[Listed]:  # fmt: skip
    found: list[Listed] = []

    def add(runtime: str, kind: str, path: Path, as_: str, **how: Any) -> None:
        made = BenchTarget(str(path), as_, trust_code=trust_code, **how)
        found.append((runtime, kind, made))

    for runtime in runtimes:
        if runtime in ("eager", "compiled"):
            add(runtime, DENSE, file, runtime, dense=True)
            add(runtime, "compact", file, runtime)
        if runtime == "eager":
            add("frozen", "compact", file, "frozen")
            add("applied", "compact", file, "applied")
        if runtime == "onnx":
            auto, lean, dense = (folder / f"{n}.onnx" for n in ("auto", "lean", "dense"))
            export(file, auto, trust_code=trust_code)
            export(file, lean, lower="always", trust_code=trust_code)
            write_dense(untie(model), images, dense)
            add("onnx", DENSE, dense, "onnx")
            add("onnx", "compact", auto, "onnx")
            add("onnx-lean", "compact", lean, "onnx", one_copy=True)
    return found


def _measure(
    listed: list[Listed], batches: Sequence[int], rounds: int, on_turn: OnTurn | None
) -> tuple[list[Measured], list[tuple[str, str]]]:  # fmt: skip
    left_out: list[tuple[str, str]] = []
    with contextlib.ExitStack() as stack:
        started: list[tuple[Listed, Process, tuple[float, int]]] = []
        for entry in listed:
            process = Process(entry[2])
            stack.callback(process.close)
            try:
                loaded = process.load()
                for batch in batches:
                    process.run(batch)  # warm up: kernels are chosen, caches filled, code compiled
            except RunError as error:
                left_out.append((f"{entry[0]}, {entry[1]}", error.what))
                continue
            started.append((entry, process, loaded))
        seconds: list[dict[int, list[float]]] = [{b: [] for b in batches} for _ in started]
        total = rounds * len(batches) * len(started)
        done = 0
        for batch in batches:
            for _ in range(rounds):
                for i, (_, process, _) in enumerate(started):
                    seconds[i][batch].append(process.run(batch))
                    done += 1
                    if on_turn is not None:
                        on_turn(done, total)
    rows: list[Measured] = []
    dense: dict[int, list[float]] | None = None
    for (entry, _, loaded), own in zip(started, seconds, strict=True):
        dense = own if entry[1] == DENSE else dense
        timings = tuple(_timing(b, own[b], dense[b] if dense else None, entry[1]) for b in batches)
        size = Path(entry[2].file).stat().st_size if _on_disk(entry) else 0
        rows.append(Measured(entry[0], entry[1], size, *loaded, timings))
    return rows, left_out


def _on_disk(entry: Listed) -> bool:
    """Whether the file is the form that is measured; a dense form in torch is made from it."""
    return not entry[2].dense


def _timing(batch: int, own: list[float], dense: list[float] | None, kind: str) -> Timing:
    median = statistics.median(own)
    if dense is None or kind == DENSE:
        return Timing(batch, median, None, None, None)
    ratios = sorted(a / b for a, b in zip(own, dense, strict=True))
    edge = len(ratios) // 10
    return Timing(batch, median, statistics.median(ratios), ratios[edge], ratios[-1 - edge])


def _check(runtimes: Sequence[str], batches: Sequence[int], rounds: int) -> None:
    known = ("eager", "compiled", "onnx")
    for runtime in runtimes:
        if runtime not in known:
            raise UserError(
                f"There is no runtime {runtime!r}", hint=f"Use some of: {', '.join(known)}"
            )
    if not runtimes or not batches or min(batches) < 1 or rounds < 3:
        raise UserError(
            "There is nothing to measure",
            hint="Name a runtime, batch sizes from 1 on, and at least 3 rounds",
        )
    if "onnx" in runtimes:
        all_formats()["onnx"].check()
        try:
            import onnxruntime  # noqa: F401
        except ImportError:
            raise MissingExtra.of("onnxruntime", "onnx", "The runtime onnx") from None


def _device() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(found: Bench, path: Path, *, force: bool = False) -> None:
    """Draw a measurement: time, memory and load time of each form, as a share of the dense one.

    Args:
        found: from `bench`.
        path: ends in `.png`, `.svg` or `.pdf`.
        force: replace an existing file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    compact = [row for row in found.rows if row.model != DENSE]
    panels: dict[str, list[tuple[float, float, float]]] = {}
    for i, timing in enumerate(compact[0].timings if compact else ()):
        panels[f"time, batch {timing.batch}"] = [_bar(row.timings[i]) for row in compact]
    panels["memory held"] = [_share(row, found, "held_bytes") for row in compact]
    panels["time to load"] = [_share(row, found, "load_seconds") for row in compact]
    figure = new_figure(2.2 * len(panels) + 1.2, 1.2 + 0.45 * max(2, len(compact)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [row.runtime for row in compact]
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        middle = [m for m, _, _ in bars]
        spread = [[m - low for m, low, _ in bars], [high - m for m, _, high in bars]]
        colours = ["#3a6ea5" if m <= 1.03 else "#c44e52" for m in middle]
        axis.barh(names, middle, xerr=spread, color=colours, height=0.6, ecolor="#555555")
        axis.axvline(1.0, color="#555555", linewidth=1, linestyle="--")
        for place, value in enumerate(middle):
            axis.annotate(
                f"{value:.2f}", (0.02, place), xycoords=("axes fraction", "data"), color="white",
                va="center", fontsize=8,
            )  # fmt: skip
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, max(1.15, *(high * 1.05 for _, _, high in bars)))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.suptitle(f"{found.file.name}: share of the dense form in the same runtime", fontsize=10)
    write_figure(figure, path, force=force)


def _bar(timing: Timing) -> tuple[float, float, float]:
    return timing.ratio or 1.0, timing.low or 1.0, timing.high or 1.0


def _share(row: Measured, found: Bench, what: str) -> tuple[float, float, float]:
    value = share_of_dense(row, found, what)
    return value, value, value


def share_of_dense(row: Measured, found: Bench, what: str) -> float:
    """A figure of a row (`held_bytes`, `load_seconds`) divided by that of its dense form."""
    dense = found.rows[0]
    for other in found.rows:
        dense = other if other.model == DENSE else dense
        if other is row:
            break
    return float(getattr(row, what)) / max(float(getattr(dense, what)), 1e-9)
