"""A conversion from a model to a file."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiedconv.commands.bench import Timing, timed
from tiedconv.commands.latency import OnRehearsal, in_time
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.fit import OnGroup
from tiedconv.conversion.pipeline import (
    Planned,
    convert_in_memory,
    fit_streamed,
    history_entry,
    macs_record,
    plan_on,
    stages_of,
)
from tiedconv.conversion.workload import counted
from tiedconv.core.plan import Plan
from tiedconv.core.workload import Workload
from tiedconv.io.atomic import check_output
from tiedconv.io.checkpoint import write_compact, write_model
from tiedconv.io.checkpoint_reader import Checkpoint
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.feasibility import smaller_options
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.macs import work_of
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.tie import state_of
from tiedconv.sources import AS_PUBLISHED, Reading, Source
from tiedconv.sources.models import OpenedModel, PreprocessChange, open_model
from tiedconv.sources.published_weights import (
    Weights,
    with_weights_named,
)
from tiedconv.timing import TimeTable
from tiedconv.timing.table import OnSite
from tiedconv.utils.stage import enter, stages


@dataclass(frozen=True)
class Conversion:
    """What `convert_file` did, or would do.

    Args:
        spec: the model.
        plan: with the relative error of each group, if it was fitted.
        source: where the model came from, and how its images are prepared, if known.
        written: the file as it was read back, None for a dry run.
        seconds: time of the fit.
        smaller: options and schemes that would store less, with their parameters.
        calibration: the history's record of it, None without images.
        native_size: height and width that the model was built for, if it says so.
        workload: multiply-adds of the original, if it could be run.
        times: of its layers, where a time was asked for.
        measured: of the file in that runtime, against the dense model.
    """

    spec: str
    plan: Plan
    source: Source
    written: Checkpoint | None = None
    seconds: float = 0.0
    smaller: tuple[tuple[str, int], ...] = ()
    calibration: Mapping[str, Any] | None = None
    native_size: tuple[int, int] | None = None
    workload: Workload | None = None
    times: TimeTable | None = None
    measured: Timing | None = None

    @property
    def latency(self) -> Mapping[str, Any] | None:
        """Time of a forward pass: original, predicted, measured; None where none was asked for."""
        if self.times is None:
            return None
        record = self.record.get("latency") or {
            "original_ns": self.times.workload.total,
            "predicted_ns": work_of(self.plan.weights, self.times.workload),
        }
        measured = None if self.measured is None else dataclasses.asdict(self.measured)
        return {**record, "measured": measured, "table": str(self.times)}

    @property
    def macs(self) -> Mapping[str, Any] | None:
        """Multiply-adds before and after, see `Report.macs`; None if not counted."""
        return None if self.workload is None else macs_record(self.plan, self.workload)

    @property
    def path(self) -> Path | None:
        """The file written, None for a dry run."""
        return None if self.written is None else self.written.path

    @property
    def record(self) -> Mapping[str, Any]:
        """The history's entry of this conversion, empty for a dry run."""
        return {} if self.written is None else self.written.history[-1]

    @property
    def size(self) -> int:
        """Of the file, in bytes; 0 for a dry run."""
        return 0 if self.written is None else self.written.size


def convert_file(
    spec: str,
    recipe: Recipe,
    output: Path | None,
    *,
    weights: Weights = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: PreprocessChange | None = None,
    force: bool = False,
    seed: int = 0,
    command: str | None = None,
    calib: Calibration | None = None,
    on_group: OnGroup | None = None,
    on_site: OnSite | None = None,
    on_rehearsal: OnRehearsal | None = None,
    own_process: bool = False,
) -> Conversion:
    """Convert a model and write the compact file; with no output, a dry run without weights.

    Without images, weights of a safetensors file (or of shards) are read and written tensor by
    tensor, so that the model may be larger than the memory (docs/streaming.md).

    Args:
        spec: the model.
        recipe: what is wanted.
        output: the file to write, None to plan only.
        weights: `default`, `none`, a file, an index of shards, a folder with one of these, or
            published weights of torchvision.
        reading: which weights of a file, and what to do where they are not finite.
        model_args: arguments of the model's constructor.
        preprocess: changes how images are prepared, as the file will say.
        force: replace an existing file.
        seed: of random weights.
        command: the command line, for the file's history.
        calib: images to convert by; while it runs, `<output>.run/` holds what is done, and
            the folder is removed when the file is written.
        on_group: called with (groups fitted, groups in all).
        on_site: called with (layer shapes timed, shapes in all), for a budget of time.
        on_rehearsal: called with the number of the model of a plan that is timed next.
        own_process: whether the memory allocator of the process may be changed for good, as the
            command line does, so that weights above 1 GiB take less memory.
    """
    folder = None
    if output is not None:
        check_output(output, force=force)
        folder = RunDir.beside(output) if calib is not None else None
    with folder.locked() if folder is not None else contextlib.nullcontext():
        if folder is not None and calib is not None and not (calib.resume or force):
            folder.require_new()
        spec, weights = with_weights_named(spec, weights)
        opened = open_model(
            spec,
            weights=None if output is None else weights,
            reading=reading,
            model_args=model_args,
            preprocess=preprocess,
            seed=seed,
            lazy=recipe.bytes is None and recipe.latency is None
            and (calib is None or weights == "default"),
        )  # fmt: skip
        found = counted(opened.model, opened.source, calib=calib)
        workload = None if found is None else found.workload

        def planning(times: TimeTable | None) -> Planned:
            return plan_on(
                opened.model, recipe, opened.source, measured=calib is not None,
                workload=workload, times=None if times is None else times.workload,
            )  # fmt: skip

        planned, times = in_time(
            opened.model,
            found,
            recipe,
            planning,
            on_site,
            on_rehearsal,
            rehearse=output is not None,
        )
        done = Conversion(
            spec, planned.sketch, opened.source, native_size=native_size(opened.model),
            workload=workload, times=times,
        )  # fmt: skip
        if output is None:
            if calib is not None:
                calib.open(opened.source)  # or raises
        else:
            with stages(stages_of(planned, calib)):
                work = _Work(done, opened, planned, output, force, command, on_group)
                if opened.tensors is not None and calib is None:
                    done = _stream(work, own_process)
                else:
                    done = _load(work, calib, folder)
        if times is not None and done.path is not None:
            done = dataclasses.replace(done, measured=timed(done.path, recipe.on))
        return dataclasses.replace(done, smaller=_smaller(planned, recipe, done.plan))


@dataclass(frozen=True)
class _Work:
    """A conversion that is planned, and what it writes; arguments are those of `convert_file`."""

    todo: Conversion
    opened: OpenedModel
    planned: Planned
    output: Path
    force: bool
    command: str | None
    on_group: OnGroup | None


def _stream(work: _Work, own_process: bool) -> Conversion:
    """Convert weights that are read and written tensor by tensor."""
    opened, planned = work.opened, work.planned
    assert opened.tensors is not None
    start = time.perf_counter()
    with fit_streamed(
        opened.model, planned, opened.tensors, work.output, work.on_group, own_process=own_process
    ) as fitted:
        seconds = time.perf_counter() - start
        history = (history_entry(fitted, opened.source, work.command, planned.info),)
        record, tensor = opened.source.to_json(), fitted.tensors.__getitem__
        enter("write")
        written = write_compact(
            work.output, fitted.plan, record, history, tensor, force=work.force
        )  # fmt: skip
    return dataclasses.replace(work.todo, plan=fitted.plan, written=written, seconds=seconds)


def _load(work: _Work, calib: Calibration | None, folder: RunDir | None) -> Conversion:
    """Convert weights in memory; `folder` is where an interrupted calibration is kept."""
    opened = work.opened.load()
    todo = dataclasses.replace(work.todo, source=opened.source)
    start = time.perf_counter()
    if calib is not None and folder is not None:
        if not calib.resume:
            folder.clear()
        calib = dataclasses.replace(calib, run_dir=folder.path)
    try:
        convert_in_memory(
            opened.model, opened.source, work.planned, calib,
            command=work.command, on_group=work.on_group,
        )  # fmt: skip
    finally:
        if folder is not None:
            folder.close()
    seconds = time.perf_counter() - start
    enter("write")
    written = write_model(opened.model, work.output, force=work.force)
    if folder is not None:
        folder.clear()
    state = state_of(opened.model)
    return dataclasses.replace(
        todo,
        plan=state.plan,
        written=written,
        seconds=seconds,
        calibration=state.history[-1].get("calibration"),
    )


def _smaller(planned: Planned, recipe: Recipe, plan: Plan) -> tuple[tuple[str, int], ...]:
    """What would store less, where the reader may have hoped for it."""
    sized = any(b is not None for b in (recipe.budget, recipe.bytes, recipe.work))
    if sized or plan.stored < 0.6 * plan.original:
        return ()
    return tuple(smaller_options(planned.info, recipe))
