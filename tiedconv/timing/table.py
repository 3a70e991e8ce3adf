"""A table of measured times, and the workload in nanoseconds that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tiedconv.core.workload import Piece, Times, Use, Workload
from tiedconv.errors import BudgetError, OutputError, first_line
from tiedconv.io.atomic import replacing
from tiedconv.runtime.example_inputs import Arguments, evaluation
from tiedconv.runtime.stopwatch import in_turn, seconds
from tiedconv.timing.inputs import batch_of, length_of, tensors_of
from tiedconv.timing.runtimes import Runtime, choose_runtime
from tiedconv.timing.sites import Site, Sites, sites_of
from tiedconv.timing.together import saved_together
from tiedconv.utils.figures import milliseconds

ROUNDS = 11
"""Runs of each form of a layer, in turn."""
MOST_OF_ALL = 0.97
"""Of the time of the model that its layers may take together."""

OnSite = Callable[[int, int], None]


@dataclass(frozen=True)
class Rehearsed:
    """A model of a plan that was timed as a whole, before the real one is fitted.

    Args:
        predicted: its time by the table, over the original's.
        measured: the same, measured; None where it could not be run.
    """

    predicted: float
    measured: float | None

    def __str__(self) -> str:
        if self.measured is None:
            return "; a model of such a plan could not be timed"
        return (
            f"; a model of such a plan takes {self.measured:.2f}x where the layers said "
            f"{self.predicted:.2f}x"
        )


@dataclass(frozen=True)
class TimeTable:
    """The times of a model's layers in one runtime.

    Args:
        workload: of the model, in nanoseconds for a batch.
        runtime: its name and version.
        layers: different shapes that were timed.
        seconds: that measuring took, then or now.
        path: where the times are kept; None where nothing can be written.
        date: when they were measured; "" if it was now.
        together: what factors save in the model over what they save in layers alone; None where
            that could not be measured, so that the first is taken for the second.
        rehearsed: whole models of such a plan that were timed, by which the times are corrected.
    """

    workload: Workload
    runtime: str
    layers: int
    seconds: float
    path: Path | None
    date: str = ""
    together: float | None = None
    rehearsed: tuple[Rehearsed, ...] = ()

    def __str__(self) -> str:
        when = f"of {self.date}" if self.date else f"measured in {self.seconds:.0f} s"
        kept = f"kept in {self.path}" if self.path else "not kept: the folder can't be written"
        in_all = (
            "layers were timed alone, not together"
            if self.together is None
            else f"in the model, factors save {self.together:.2f} times what they save alone"
        )
        return (
            f"{self.layers} layer shapes in {self.runtime}, {when}, {kept}; the "
            f"original takes {milliseconds(self.workload.total)}; {in_all}"
            f"{''.join(map(str, self.rehearsed))}"
        )


@dataclass(frozen=True)
class _Measured:
    """What a file of the cache holds.

    Args:
        total: nanoseconds of the model.
        sites: of each site: as it is, and for each of its ranks.
        together: see `TimeTable`.
        seconds: that measuring took.
        date: "" if it was now.
    """

    total: float
    sites: list[list[float]]
    together: float | None
    seconds: float
    date: str = ""


def measure_times(
    model: nn.Module,
    workload: Workload,
    runtime: str,
    batch_size: int = 1,
    threads: int = 1,
    *,
    arguments: Arguments | None = None,
    on_site: OnSite | None = None,
) -> TimeTable:
    """Time a model and its layers, each as it is and with factors of a few ranks.

    Between ranks the time of factors is a straight line, which fits two products well: a fixed
    part and one for each multiply-add. What they save is scaled to what a model of thin layers
    saves (`timing.together`). Times are kept in a file of the user's cache (`folder`),
    under a hash of the shapes, the runtime, its version, the processor, batch size and threads; who
    wants new ones removes it.

    Args:
        model: plain, in memory, on the CPU.
        workload: of the model, in multiply-adds.
        runtime: one of `all_runtimes`.
        batch_size: inputs at a time.
        threads: of the runtime.
        arguments: what the workload was counted on; None for zeros of the same shapes.
        on_site: called with (shapes timed, shapes in all).

    Raises:
        UserError: unknown runtime.
        MissingExtra: it is not installed.
        BudgetError: the model can't be run on so many inputs at a time (`latency-unknown`).
    """
    chosen = choose_runtime(runtime)
    if arguments is None:
        arguments = tuple(torch.zeros(shape) for shape in workload.inputs), {}
    batch = batch_of(arguments, batch_size)
    found = sites_of(model, batch_of(arguments, length_of(arguments)), workload, batch_size)
    sites = list(
        dict.fromkeys(
            site for each in found.values() for site in each if site.ranks or site.groups > 1
        )
    )
    key = _key(model, workload, batch, sites, chosen, threads)
    place = folder() / f"{key}.json"
    kept = _read(place, sites)
    kept_at: Path | None = place
    if kept is None:
        _require_batch(model, batch, batch_size)
        kept = _measure(model, batch, found, sites, chosen, threads, on_site)
        kept_at = _write(place, kept)
    timed = _in_nanoseconds(workload, found, sites, kept, chosen.limit)
    about = f"{chosen.name} {chosen.version()}"
    return TimeTable(
        timed, about, len(sites), kept.seconds, kept_at, kept.date, kept.together
    )  # fmt: skip


def folder() -> Path:
    """Where tables are kept: `tiedconv/times` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tiedconv" / "times"


def _require_batch(model: nn.Module, batch: Arguments, count: int) -> None:
    try:
        with evaluation(model), torch.inference_mode():
            model(*batch[0], **batch[1])
    except Exception as error:  # models reject inputs with any error
        raise BudgetError(
            f"The time of this model can't be measured: it can't be run on {count} inputs at a "
            f"time ({type(error).__name__}: {first_line(error)})",
            "A budget of time means nothing without it",
            "Give another batch size, or a budget of multiply-adds: --macs 60%",
            code="latency-unknown",
        ) from error


def _measure(
    model: nn.Module,
    batch: Arguments,
    found: Sites,
    sites: list[Site],
    runtime: Runtime,
    threads: int,
    on_site: OnSite | None,
) -> _Measured:
    start = time.perf_counter()
    whole: list[float] = []
    table: list[list[float]] = []
    with tempfile.TemporaryDirectory() as files, evaluation(model):
        run = runtime.model(model, batch, Path(files), threads)
        seconds(run, 1)
        for done, site in enumerate(sites, 1):
            given = torch.zeros(site.shape)
            forms = [
                runtime.layers(site.layers(rank), given, threads)
                for rank in (None, *site.ranks)
            ]  # fmt: skip
            table.append([1e9 * each for each in in_turn(forms, ROUNDS)])
            whole.append(1e9 * seconds(run, 1))
            if on_site is not None:
                on_site(done, len(sites))
        whole += [1e9 * seconds(run, 1) for _ in range(max(0, ROUNDS - len(whole)))]
        total, rows = statistics.median(whole), dict(zip(sites, table, strict=True))
        with tempfile.TemporaryDirectory() as others:
            together = saved_together(
                model, batch, found, rows, run, total, runtime, Path(others), threads
            )  # fmt: skip
    return _Measured(total, table, together, time.perf_counter() - start)


def _in_nanoseconds(
    workload: Workload, found: Sites, sites: list[Site], measured: _Measured, limit: float | None
) -> Workload:  # fmt: skip
    """The workload with times in place of counts."""
    table = dict(zip(sites, measured.sites, strict=True))
    uses: dict[str, Use] = {}
    for name, use in workload.uses.items():
        pieces = []
        for piece in use.pieces:
            each = [_line(site, table[site], limit) for site in found[name, piece] if site in table]
            if each:
                pieces.append(dataclasses.replace(piece, times=_sum(each)))
        uses[name] = Use(sum(p.times.whole for p in pieces if p.times), tuple(pieces))
    taken = sum(use.work for use in uses.values())
    share = min(1.0, MOST_OF_ALL * measured.total / taken) if taken else 1.0
    saving = share if measured.together is None else measured.together
    scaled = {
        name: Use(use.work * share, tuple(_scaled(piece, share, saving) for piece in use.pieces))
        for name, use in uses.items()
    }
    return Workload(round(measured.total), scaled, workload.inputs, "ns")


def _scaled(piece: Piece, share: float, saving: float) -> Piece:
    """A layer's times of which a share is counted, and what factors save of them scaled apart."""
    if (times := piece.times) is None:
        return piece
    whole = times.whole * share
    fixed = max(0.0, whole - saving * (times.whole - times.fixed))
    return dataclasses.replace(
        piece, times=Times(whole, fixed, times.each * saving, times.limit, times.cut)
    )  # fmt: skip


def corrected(times: Workload, factor: float) -> Workload:
    """Times with what factors save multiplied by a number."""
    uses = {
        name: dataclasses.replace(use, pieces=tuple(_saving(p, factor) for p in use.pieces))
        for name, use in times.uses.items()
    }
    return dataclasses.replace(times, uses=uses)


def _saving(piece: Piece, factor: float) -> Piece:
    """A layer whose factors, and whose parts, save so many times as much."""
    scaled = _scaled(piece, 1.0, factor)
    if scaled.times is None:
        return piece
    times = dataclasses.replace(scaled.times, cut=factor * scaled.times.cut)
    return dataclasses.replace(scaled, times=times)


def _sum(each: Iterable[Times]) -> Times:
    whole = fixed = slope = 0.0
    limit: float | None = None
    for times in each:
        whole, fixed, slope = whole + times.whole, fixed + times.fixed, slope + times.each
        limit = times.limit
    return Times(whole, fixed, slope, limit)


def _line(site: Site, measured: list[float], limit: float | None) -> Times:
    """The straight line through the times of factors."""
    whole, *factored = measured
    counts = [site.macs(rank) for rank in site.ranks]
    if not counts:
        return Times(whole, whole, 0.0, limit)
    if len(counts) == 1:
        return Times(whole, 0.0, factored[0] / counts[0], limit)
    slope, fixed = statistics.linear_regression(counts, factored)
    if slope <= 0 or fixed < 0:  # noise: time is in proportion to the multiply-adds
        slope, fixed = sum(factored) / sum(counts), 0.0
    return Times(whole, fixed, slope, limit)


def _key(
    model: nn.Module, workload: Workload, batch: Arguments, sites: list[Site], runtime: Runtime,
    threads: int,
) -> str:  # fmt: skip
    """A hash of all that times depend on."""
    shapes = [[name, list(p.shape)] for name, p in model.named_parameters()]
    classes = [type(module).__qualname__ for module in model.modules()]
    about = [
        runtime.name, runtime.version(), torch.__version__, processor(), threads,
        [list(x.shape) for x in tensors_of(batch)], workload.total, shapes, classes,
        [dataclasses.astuple(site) for site in sites],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]


def processor() -> str:
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _read(path: Path, sites: list[Site]) -> _Measured | None:
    """What a table says; None where there is none that fits."""
    try:
        data = json.loads(path.read_text())
        table = [[float(value) for value in row] for row in data["sites"]]
        together = None if data["together"] is None else float(data["together"])
        total, took = float(data["total"]), float(data["seconds"])
        found = _Measured(total, table, together, took, str(data["date"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fits = [len(row) for row in table] == [1 + len(site.ranks) for site in sites]
    return found if fits else None


def _write(path: Path, measured: _Measured) -> Path | None:
    """Keep a table; returns where, None if it can't be."""
    today = time.strftime("%Y-%m-%d")
    data = {**dataclasses.asdict(measured), "date": today}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, force=True) as part:
            part.write_text(json.dumps(data))
    except (OSError, OutputError):
        return None
    return path
