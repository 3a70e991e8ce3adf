"""The command `bench`: time and memory of a compact file, compared with its dense form.

Each form runs in its own process, and the runs are interleaved, so that background load affects all
forms equally: ratios hold where seconds don't. A ratio is taken within each round; its median and
the middle 80 % are reported.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands._reference import images_for
from tiedconv.commands.export import export
from tiedconv.errors import RunError, UserError
from tiedconv.exporters import all_formats
from tiedconv.planning.budget import RunsOn
from tiedconv.runtime.forward_check import further_inputs, token_count
from tiedconv.runtime.tie import untie
from tiedconv.sources.models import load
from tiedconv.timing import all_runtimes, choose_runtime
from tiedconv.timing.table import processor
from tiedconv.utils.plotting import new_figure, write_figure

DENSE = "dense"
OnTurn = Callable[[int, int], None]

_FURTHER = {"eager": ("cached", "factored", "optimized"), "compiled": ("compiled-optimized",)}
"""Compact forms that are measured in a runtime besides the one of its name."""


@dataclass(frozen=True)
class Timing:
    """Runs of one form at one batch size.

    Args:
        batch: images at a time.
        seconds: median for one run.
        ratio: to the dense form in the same runtime, median over rounds; None for the dense form
            itself, or where that was not measured.
        low, high: bounds of the middle 80 % of the ratios.
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
    """One form.

    Args:
        runtime: `eager`, `cached` (after `freeze`), `factored` (after `apply_factors`), `optimized`
            (after `optimize`), `compiled`, `compiled-optimized` (after both), `onnx`, `onnx-lean`
            (factors applied wherever possible, one copy of each matrix), or a format that is
            timed, such as `openvino`.
        model: `compact` or `dense`.
        baseline: the runtime of the dense form that it is compared with.
        file_bytes: size of the loaded file; 0 for a dense form that is made from the compact file.
        load_seconds: until the model is ready, the runtime itself being loaded already.
        held_bytes: memory of the process that the loaded model takes.
        timings: by batch size.
    """

    runtime: str
    model: str
    baseline: str
    file_bytes: int
    load_seconds: float
    held_bytes: int
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class Bench:
    """What `bench` found.

    Args:
        file: the compact file.
        rows: the forms, compact ones after the dense form that they are compared with.
        rounds: runs of each form at each batch size.
        threads: threads of each runtime.
        device: the processor.
        left_out: forms that could not be measured, and why.
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
        runtimes: `eager` (with `cached`, `factored` and `optimized`), `compiled` (with
            `compiled-optimized`), `onnx` (with `onnx-lean`), `openvino`, `executorch`.
        batches: images at a time.
        rounds: runs of each form at each batch size, at least 3.
        threads: threads of each runtime.
        trust_code: allow the file to name a function that builds the model.
        on_turn: called with (runs done, runs in total).

    Raises:
        UserError: unknown runtime, or one whose package is missing.
        RunError: no compact form could be compared with its dense form, or a process ended.
    """
    _check(runtimes, batches, rounds)
    model = load(file, trust_code=trust_code)
    images = images_for(model)
    shape = tuple(images.shape[1:]) if images.is_floating_point() else ()
    with tempfile.TemporaryDirectory() as folder:
        forms = [
            dataclasses.replace(
                form,
                target=dataclasses.replace(
                    form.target, threads=threads, shape=shape, tokens=token_count(model, images)
                ),
            )
            for form in _forms(Path(file), runtimes, Path(folder), model, images, trust_code)
        ]
        rows, left_out = _measure(forms, batches, rounds, on_turn)
    if not any(row.timings[0].ratio is not None for row in rows):
        raise RunError(
            f"Nothing of {file} could be compared with its dense form "
            f"({'; '.join(f'{name}: {why}' for name, why in left_out)})",
            "There is nothing to report",
            "Choose another runtime with --runtime",
            code="nothing-compared",
        )
    return Bench(Path(file), tuple(rows), rounds, threads, processor(), tuple(left_out))


_ROWS = {"onnx": ("onnx", "onnx"), "openvino": ("openvino",) * 2, "torch": ("eager", "optimized")}
"""Of a runtime that is timed: what `bench` calls it, and its compact row."""


def timed(file: str | Path, on: RunsOn, rounds: int = 15) -> Timing:
    """The time of a compact file where a budget asked for it, against its dense form.

    Args:
        file: a compact file that this process wrote.
        on: the runtime, batch size and threads.
        rounds: runs of each.
    """
    runtime, name = _ROWS[on.runtime]
    found = bench(
        file, runtimes=(runtime,), batches=(on.batch_size,), rounds=rounds, threads=on.threads,
        trust_code=True,
    )  # fmt: skip
    rows = (row for row in found.rows if row.runtime == name and row.model != DENSE)
    return next(rows).timings[0]


@dataclass(frozen=True)
class _Form:
    """A form to measure; `runtime`, `model` and `baseline` are those of `Measured`."""

    runtime: str
    model: str
    baseline: str
    target: BenchTarget

    @property
    def file_bytes(self) -> int:
        """Size of the file; 0 for a dense form in torch, which is made from the compact file."""
        return 0 if self.target.dense else Path(self.target.file).stat().st_size


def _forms(
    file: Path, runtimes: Sequence[str], folder: Path, model: torch.nn.Module, images: torch.Tensor,
    trust_code: bool,
) -> list[_Form]:  # fmt: skip
    found: list[_Form] = []

    def add(runtime: str, kind: str, baseline: str, path: Path, run_by: str, **how: Any) -> None:
        target = BenchTarget(str(path), run_by, trust_code=trust_code, **how)
        found.append(_Form(runtime, kind, baseline, target))

    for runtime in runtimes:
        if runtime in ("eager", "compiled"):
            add(runtime, DENSE, runtime, file, runtime, dense=True)
            add(runtime, "compact", runtime, file, runtime)
        for name in _FURTHER.get(runtime, ()):
            add(name, "compact", runtime, file, name)
        if runtime in timed_formats():
            form = all_formats()[runtime]
            # OpenVINO writes an ONNX file of the same stem on its way, and removes it.
            own, lean, dense = (
                folder / f"{runtime}-{kind}{form.endings[0]}"
                for kind in ("compact", "lean", "plain")
            )
            export(file, own, runtime, trust_code=trust_code)
            text = further_inputs(model, images).get("input_ids")
            form.write_plain(untie(copy.deepcopy(model)), images, dense, text)
            add(runtime, DENSE, runtime, dense, runtime)
            add(runtime, "compact", runtime, own, runtime)
            if form.lean:
                export(file, lean, runtime, lower="always", trust_code=trust_code)
                add(f"{runtime}-lean", "compact", runtime, lean, runtime, lean=True)
    return found


@dataclass
class _Started:
    """A form that has loaded its model, and the seconds of its runs by batch size."""

    form: _Form
    process: Process
    load_seconds: float
    held_bytes: int
    seconds: dict[int, list[float]]


def _measure(
    forms: list[_Form], batches: Sequence[int], rounds: int, on_turn: OnTurn | None
) -> tuple[list[Measured], list[tuple[str, str]]]:  # fmt: skip
    left_out: list[tuple[str, str]] = []
    started: list[_Started] = []
    with contextlib.ExitStack() as stack:
        for form in forms:
            process = Process(form.target)
            stack.callback(process.close)
            try:
                loaded = process.load()
                for batch in batches:
                    process.run(batch)  # warm up: kernels are chosen, caches filled, code compiled
            except RunError as error:
                left_out.append((f"{form.runtime}, {form.model}", error.what))
                continue
            started.append(_Started(form, process, *loaded, {b: [] for b in batches}))
        turns = [(s, b) for b in batches for _ in range(rounds) for s in started]
        for done, (one, batch) in enumerate(turns, 1):
            one.seconds[batch].append(one.process.run(batch))
            if on_turn is not None:
                on_turn(done, len(turns))
    dense = {s.form.baseline: s.seconds for s in started if s.form.model == DENSE}
    return [_measured(s, dense.get(s.form.baseline), batches) for s in started], left_out


def _measured(
    one: _Started, dense: dict[int, list[float]] | None, batches: Sequence[int]
) -> Measured:  # fmt: skip
    form = one.form
    timings = tuple(
        _timing(b, one.seconds[b], dense[b] if dense else None, form.model) for b in batches
    )
    return Measured(
        form.runtime, form.model, form.baseline, form.file_bytes, one.load_seconds, one.held_bytes,
        timings,
    )  # fmt: skip


def _timing(batch: int, own: list[float], dense: list[float] | None, kind: str) -> Timing:
    median = statistics.median(own)
    if dense is None or kind == DENSE:
        return Timing(batch, median, None, None, None)
    ratios = sorted(a / b for a, b in zip(own, dense, strict=True))
    edge = len(ratios) // 10
    return Timing(batch, median, statistics.median(ratios), ratios[edge], ratios[-1 - edge])


def timed_formats() -> list[str]:
    """Formats whose files `bench` measures in their own runtime."""
    return [name for name, form in all_formats().items() if form.timed]


def _check(runtimes: Sequence[str], batches: Sequence[int], rounds: int) -> None:
    known = ("eager", "compiled", *timed_formats())
    for runtime in runtimes:
        if runtime not in known:
            raise UserError(
                f"Unknown runtime {runtime!r}",
                hint=f"Use some of: {', '.join(known)}",
                code="unknown-runtime",
            )
    if not runtimes or not batches or min(batches) < 1 or rounds < 3:
        raise UserError(
            "There is nothing to measure",
            hint="Name a runtime, batch sizes of at least 1, and at least 3 rounds",
            code="nothing-to-measure",
        )
    for runtime in {*timed_formats()} & {*runtimes}:
        all_formats()[runtime].check()
    for runtime in {*all_runtimes()} & {*runtimes}:
        choose_runtime(runtime)


def draw(found: Bench, path: Path, *, force: bool = False) -> None:
    """Plot a measurement: time, memory and load time of each form, as a ratio to the dense one.

    Args:
        found: from `bench`.
        path: ends in `.png`, `.svg` or `.pdf`.
        force: replace an existing file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    compact = [row for row in found.rows if row.timings[0].ratio is not None]
    panels: dict[str, list[tuple[float, float, float]]] = {}
    for i, timing in enumerate(compact[0].timings if compact else ()):
        panels[f"time, batch {timing.batch}"] = [_bar(row.timings[i]) for row in compact]
    for title, what in (("memory held", "held_bytes"), ("time to load", "load_seconds")):
        panels[title] = [(ratio_to_dense(row, found, what) or 1.0,) * 3 for row in compact]
    figure = new_figure(2.2 * len(panels) + 1.2, 1.2 + 0.45 * max(2, len(compact)))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [row.runtime for row in compact]
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        middle = [m for m, _, _ in bars]
        spread = [[m - low for m, low, _ in bars], [high - m for m, _, high in bars]]
        colors = ["#3a6ea5" if m <= 1.03 else "#c44e52" for m in middle]
        axis.barh(names, middle, xerr=spread, color=colors, height=0.6, ecolor="#555555")
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
    figure.suptitle(f"{found.file.name}: ratio to the dense form in the same runtime", fontsize=10)
    write_figure(figure, path, force=force)


def _bar(timing: Timing) -> tuple[float, float, float]:
    return timing.ratio or 1.0, timing.low or 1.0, timing.high or 1.0


def ratio_to_dense(row: Measured, found: Bench, what: str) -> float | None:
    """A figure of a row (`held_bytes`, `load_seconds`) divided by that of its dense form.

    Returns:
        None if the dense form was not measured.
    """
    for other in found.rows:
        if other.model == DENSE and other.baseline == row.baseline:
            return float(getattr(row, what)) / max(float(getattr(other, what)), 1e-9)
    return None
