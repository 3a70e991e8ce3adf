"""The verbs `plan` and `convert`: from a model to a tied one."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tiedconv.calibration import CalibConfig
from tiedconv.commands.bench import Timing, timed
from tiedconv.conversion.calibrate import Calibration, Images
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
from tiedconv.conversion.workload import count_macs
from tiedconv.core.plan import Plan
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError, UserError
from tiedconv.integrations import let_others_save
from tiedconv.io.atomic import check_output
from tiedconv.io.checkpoint import write_compact, write_model
from tiedconv.io.checkpoint_reader import Checkpoint
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.feasibility import smaller_options
from tiedconv.planning.recipe import DEFAULT_SCHEME, Recipe, RunsOn, Size
from tiedconv.runtime.example_inputs import Example
from tiedconv.runtime.macs import work_of
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.tie import state_of
from tiedconv.sources import AS_PUBLISHED, Reading, Source
from tiedconv.sources.models import OpenedModel, PreprocessChange, open_model
from tiedconv.sources.published_weights import (
    Weights,
    preprocess_change,
    with_weights_named,
)
from tiedconv.timing import TimeTable, measure_times
from tiedconv.timing.table import OnSite
from tiedconv.utils.stage import enter, stages
from tiedconv.utils.typing import keeps_type


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


def plan(
    model: str | nn.Module,
    scheme: str = DEFAULT_SCHEME,
    *,
    params: Size | None = None,
    bytes: Size | None = None,
    bits: int | str | None = None,
    macs: Size | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    recipe: Recipe | None = None,
    model_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What a conversion would store, without any weights: groups, expressions, exact sizes.

    Args:
        model: a model, or its spec, such as `resnet50` or `timm:vit_tiny_patch16_224`.
        scheme: name of the scheme; without a budget, `auto` halves the model.
        params: parameters that may be stored: `0.5` or `50%` of the original's, or a number.
        bytes: of the file, likewise; its weights are integers then.
        bits: of an integer, at most.
        macs: multiply-adds that a forward pass may take with `apply_factors`, as `params`.
        include, exclude: glob patterns of tensor names.
        recipe: rules and budget instead of these and `options`.
        model_args: arguments of the model's constructor, for a spec.
        options: of the scheme, such as `rank`.

    Raises:
        UserError: unknown model or scheme, nothing to convert, a budget that can't be met, an
            example that the model does not take.
    """
    opened = open_model(model, weights=None, model_args=model_args)
    recipe = recipe or Recipe.of(
        scheme, params=params, bytes=bytes, bits=bits, macs=macs, include=include, exclude=exclude,
        **options,
    )  # fmt: skip
    return plan_on(opened.model, recipe, opened.source).sketch


@keeps_type  # type: ignore[arg-type]  # whose options could be named `model`, for all it knows
def convert(
    model: str | nn.Module,
    scheme: str = DEFAULT_SCHEME,
    *,
    params: Size | None = None,
    bytes: Size | None = None,
    bits: int | str | None = None,
    macs: Size | None = None,
    latency: Size | None = None,
    on: RunsOn | str = "onnx",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    recipe: Recipe | None = None,
    weights: Weights = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Any = None,
    inplace: bool = False,
    seed: int = 0,
    calib: Images | Calibration | None = None,
    effort: str | None = None,
    example: Example | None = None,
    on_group: OnGroup | None = None,
    **options: Any,
) -> nn.Module:
    """The model with tied weights: the same class, far fewer stored parameters.

    Args:
        model: a model in memory, or a spec, such as `resnet50`.
        scheme: name of the scheme; without a budget, `auto` halves the model.
        params: parameters that may be stored: `0.5` or `50%` of the original's, or a number.
        bytes: of the file, likewise; its weights are integers then.
        bits: of an integer, at most.
        macs: multiply-adds that a forward pass may take with `apply_factors`, as `params`.
        latency: time that it may take on this machine: `0.6` or `0.6x` of the original's, or `8ms`.
            Its layers are timed first.
        on: runtime of that time (`onnx`, `openvino`, `torch`), or a `RunsOn` with batch size and
            threads.
        include, exclude: glob patterns of tensor names.
        recipe: rules and budget instead of these and `options`.
        weights: for a spec: `default`, `none`, a file, or published weights of torchvision, such as
            `ResNet50_Weights.IMAGENET1K_V1`.
        reading: which weights of a file, and what to do where they are not finite.
        model_args: arguments of the model's constructor, for a spec.
        preprocess: how its images are prepared, where the model does not say: torchvision's
            `weights.transforms()`, or a `Preprocess`.
        inplace: change the given model rather than a copy of it.
        seed: of random weights.
        calib: images to convert by, without labels: a folder, a tensor `(images, C, H, W)`, a data
            set or a `DataLoader` of one, or a `Calibration` that says how many, and more. The
            model is left on the CPU.
        effort: of a calibration by `calib`: `fast`, `normal` (the default) or `thorough`.
        example: an input of the model: a tensor, a tuple of arguments or a dict of keyword
            arguments. Symmetries are tried on it; without it, on inputs of usual shapes. Give it
            for a model that takes none of these; with `calib` the first image is used.
        on_group: called with (groups fitted, groups in all).
        options: of the scheme, such as `rank`.

    Returns:
        the tied model, of the class of the given one. `tiedconv.save` writes it, `tiedconv.report`
        lists what it stores.

    Raises:
        UserError: unknown model or scheme, nothing to convert, a budget that can't be met.
    """
    opened = open_model(
        model, weights=weights, reading=reading, model_args=model_args, seed=seed,
        preprocess=None if preprocess is None else preprocess_change(preprocess),
    )  # fmt: skip
    network = opened.model
    if network is model and not inplace:
        network = copy.deepcopy(network)
    wanted = recipe or Recipe.of(
        scheme, params=params, bytes=bytes, bits=bits, macs=macs, latency=latency, on=on,
        include=include, exclude=exclude, **options,
    )  # fmt: skip
    given = _calibration(calib, effort)
    workload = None
    if wanted.work is not None:
        workload = count_macs(network, opened.source, example, given)
    times = _times(network, workload, wanted)
    planned = plan_on(
        network, wanted, opened.source, example, measured=calib is not None, workload=workload,
        times=None if times is None else times.workload,
    )  # fmt: skip
    convert_in_memory(network, opened.source, planned, given, on_group=on_group)
    let_others_save(network)
    return network


def _calibration(calib: Images | Calibration | None, effort: str | None) -> Calibration | None:
    """The images with the effort.

    Raises:
        UserError: an effort without images (`needs-calib`), or beside a whole `Calibration`.
    """
    if calib is None and effort is not None:
        raise UserError(
            "effort was given without calib",
            "It has no effect without calibration images",
            "Give images, or leave it out",
            code="needs-calib",
        )
    if isinstance(calib, Calibration) and effort is not None:
        raise UserError(
            "effort and a Calibration were both given",
            "The Calibration says its own",
            "Write it as Calibration(..., config=CalibConfig(effort=...))",
            code="options-conflict",
        )
    if calib is None or isinstance(calib, Calibration):
        return calib
    return Calibration(calib, config=CalibConfig(effort=effort or "normal"))


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
        workload = count_macs(opened.model, opened.source, calib=calib)
        times = _times(opened.model, workload, recipe, on_site)
        planned = plan_on(
            opened.model, recipe, opened.source, measured=calib is not None, workload=workload,
            times=None if times is None else times.workload,
        )  # fmt: skip
        done = Conversion(
            spec, planned.sketch, opened.source, native_size=native_size(opened.model),
            workload=workload, times=times,
        )  # fmt: skip
        if output is None:
            if calib is not None:
                calib.open(opened.source)  # or raises
        else:
            with stages(stages_of(planned, calib)):
                if opened.tensors is not None and calib is None:
                    done = _stream(
                        done, opened, planned, output, force, command, on_group, own_process
                    )
                else:
                    done = _load(
                        done, opened, planned, output, force, command, on_group, calib, folder
                    )
        if times is not None and done.path is not None:
            done = dataclasses.replace(done, measured=timed(done.path, recipe.on))
        return dataclasses.replace(done, smaller=_smaller(planned, recipe, done.plan))


def _times(
    model: nn.Module, workload: Workload | None, recipe: Recipe, on_site: OnSite | None = None
) -> TimeTable | None:
    """The times of a model's layers, where a recipe limits its time.

    Raises:
        BudgetError: it can't be run on any input (`latency-unknown`), or not on images alone.
    """
    if recipe.latency is None:
        return None
    if workload is None:
        raise BudgetError(
            "The time of this model can't be measured: it runs on no input that was tried",
            f"latency={recipe.latency.text!r} means nothing without it",
            "Give an example of its input (in Python: example=...), or ask for --params instead",
            code="latency-unknown",
        )
    if any(p.is_meta for p in model.parameters()):  # a plan, without weights: any have its time
        model = model.to_empty(device="cpu")
    on = recipe.on
    return measure_times(
        model, workload, on.runtime, on.batch_size, on.threads, on_site=on_site
    )  # fmt: skip


def _stream(
    todo: Conversion,
    opened: OpenedModel,
    planned: Planned,
    output: Path,
    force: bool,
    command: str | None,
    on_group: OnGroup | None,
    own_process: bool,
) -> Conversion:
    """Convert weights that are read and written tensor by tensor."""
    assert opened.tensors is not None
    start = time.perf_counter()
    with fit_streamed(
        opened.model, planned, opened.tensors, output, on_group, own_process=own_process
    ) as fitted:
        seconds = time.perf_counter() - start
        history = (history_entry(fitted, opened.source, command, planned.info),)
        record, tensor = opened.source.to_json(), fitted.tensors.__getitem__
        enter("write")
        written = write_compact(output, fitted.plan, record, history, tensor, force=force)
    return dataclasses.replace(todo, plan=fitted.plan, written=written, seconds=seconds)


def _load(
    todo: Conversion,
    opened: OpenedModel,
    planned: Planned,
    output: Path,
    force: bool,
    command: str | None,
    on_group: OnGroup | None,
    calib: Calibration | None,
    folder: RunDir | None,
) -> Conversion:
    """Convert weights in memory; `folder` is where an interrupted calibration is kept."""
    opened = opened.load()
    todo = dataclasses.replace(todo, source=opened.source)
    start = time.perf_counter()
    if calib is not None and folder is not None:
        if not calib.resume:
            folder.clear()
        calib = dataclasses.replace(calib, run_dir=folder.path)
    try:
        convert_in_memory(
            opened.model, opened.source, planned, calib, command=command, on_group=on_group
        )
    finally:
        if folder is not None:
            folder.close()
    seconds = time.perf_counter() - start
    enter("write")
    written = write_model(opened.model, output, force=force)
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
