"""The verbs `plan` and `convert`: from a model to a tied one."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import tiedconv.sources as sources
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import OnGroup, bind, calibrated, finalists, fit_all
from tiedconv.conversion.streaming import streamed
from tiedconv.core.plan import Plan
from tiedconv.errors import UserError
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.io.atomic import check_output
from tiedconv.io.checkpoint import save, write_compact
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.planner import first_plan, smaller_options
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.tie import is_tied, set_state, state_of
from tiedconv.sources import LazyWeights, Preprocess, Source
from tiedconv.sources.load import check_preprocess, is_compact, with_preprocess
from tiedconv.version import __version__


@dataclass(frozen=True)
class Conversion:
    """What `convert_file` did, or would do.

    Args:
        spec: the model.
        plan: with the relative error of each group, if it was fitted.
        preprocess: how the model wants its images, if known.
        path: the file written, None for a dry run.
        size: of the file, in bytes.
        seconds: time of the fit.
        ways: options and schemes that would store less, with their parameters.
        calibration: what the images showed, if there were any; as in the file's history.
    """

    spec: str
    plan: Plan
    preprocess: Preprocess | None
    path: Path | None
    size: int
    seconds: float
    ways: tuple[tuple[str, int], ...]
    calibration: Mapping[str, Any] | None = None


def plan(
    model: str | nn.Module,
    scheme: str = "tied",
    *,
    recipe: Recipe | None = None,
    model_args: Mapping[str, Any] | None = None,
    **options: Any,
) -> Plan:
    """What a conversion would store, without any weights: groups, expressions, exact sizes.

    Args:
        model: a model, or its spec, such as `resnet50` or `timm:vit_tiny_patch16_224`.
        scheme: name of the scheme.
        recipe: rules and budget instead of `scheme` and `options`.
        model_args: arguments of the model's constructor, for a spec.
        options: `params`, `include`, `exclude`, and the scheme's options.

    Raises:
        UserError: unknown model or scheme, nothing to convert, a budget that can't be met.
    """
    if isinstance(model, str):
        model, _ = sources.outline(model, model_args)
    return first_plan(inspect_model(model), recipe or Recipe.of(scheme, **options))


def convert(
    model: str | nn.Module,
    scheme: str = "tied",
    *,
    recipe: Recipe | None = None,
    weights: str | Path = "default",
    model_args: Mapping[str, Any] | None = None,
    inplace: bool = False,
    seed: int = 0,
    calib: str | Path | Dataset[Any] | Calibration | None = None,
    on_group: OnGroup | None = None,
    **options: Any,
) -> nn.Module:
    """The model with tied weights: the same class, far fewer numbers.

    Args:
        model: a model in memory, or a spec, such as `resnet50`.
        scheme: name of the scheme.
        recipe: rules and budget instead of `scheme` and `options`.
        weights: for a spec: `default`, `none`, or a file.
        model_args: arguments of the model's constructor, for a spec.
        inplace: change the given model rather than a copy of it.
        seed: of random weights.
        calib: images to convert by, without labels: a folder, a data set, or a `Calibration`
            that says how many and with what effort. The model is left on the CPU.
        on_group: called with (groups fitted, groups in all).
        options: `params`, `include`, `exclude`, and the scheme's options.

    Returns:
        the tied model. `tiedconv.save` writes it, `tiedconv.report` tells of it.

    Raises:
        UserError: unknown model or scheme, nothing to convert, a budget that can't be met.
    """
    recipe = recipe or Recipe.of(scheme, **options)
    if isinstance(model, str):
        model, source = sources.open_source(model, model_args, weights, seed=seed)
    else:
        if is_tied(model):
            raise UserError("This model is tied already", hint="Call tiedconv.untie on it first")
        source = Source("", weights="memory")
        model = model if inplace else copy.deepcopy(model)
    if calib is not None and not isinstance(calib, Calibration):
        calib = Calibration(calib)
    return _convert(model, source, recipe, None, on_group, calib)


def convert_file(
    spec: str,
    recipe: Recipe,
    output: Path | None,
    *,
    weights: str | Path = "default",
    model_args: Mapping[str, Any] | None = None,
    preprocess: Callable[[Preprocess], Preprocess] | None = None,
    force: bool = False,
    seed: int = 0,
    command: str | None = None,
    calib: Calibration | None = None,
    on_group: OnGroup | None = None,
) -> Conversion:
    """Convert a model and write the compact file; with no output, a dry run without weights.

    Without images, weights of a safetensors file (or of shards) are read and written tensor by
    tensor, so that the model may be larger than the memory (docs/streaming.md).

    Args:
        spec: the model.
        recipe: what is wanted.
        output: the file to write, None to plan only.
        weights: `default`, `none`, a file, an index of shards, or a folder with one of these.
        model_args: arguments of the model's constructor.
        preprocess: changes how images are prepared, as the file will say.
        force: replace an existing file.
        seed: of random weights.
        command: the command line, for the file's history.
        calib: images to convert by; while it runs, `<output>.run/` holds what is done, and
            the folder is removed when the file is written.
        on_group: called with (groups fitted, groups in all).
    """
    if is_compact(spec):
        raise UserError(
            f"{spec} is a compact file already",
            "It was left as it is",
            "Convert the original model with other options, or heal this one: tiedconv finetune",
        )
    check_preprocess(spec, model_args, preprocess)
    if output is None:
        skeleton, source = sources.outline(spec, model_args)
        if calib is not None:
            calib.open(with_preprocess(source, preprocess))  # or raises
        info = inspect_model(skeleton)
        planned = first_plan(info, recipe)
        ways = _ways(info, recipe, planned)
        return Conversion(spec, planned, source.preprocess, None, 0, 0.0, ways)
    check_output(output, force=force)
    folder = RunDir.beside(output)
    if calib is not None and not (calib.resume or force):
        folder.require_new()
    lazy = sources.open_lazily(spec, model_args, weights) if calib is None else None
    if lazy is not None:
        model, source, tensors = lazy
        source = with_preprocess(source, preprocess)
        return _stream(spec, model, source, tensors, recipe, output, force, command, on_group)
    if weights == "default":
        # A plan that can't be is refused before weights are fetched.
        first_plan(inspect_model(sources.outline(spec, model_args)[0]), recipe)
    model, source = sources.open_source(spec, model_args, weights, seed=seed)
    info = inspect_model(model)
    source = with_preprocess(source, preprocess)
    start = time.perf_counter()
    if calib is not None:
        if not calib.resume:
            folder.clear()
        calib = dataclasses.replace(calib, run_dir=folder.path)
    try:
        _convert(model, source, recipe, command, on_group, calib)
    finally:
        if calib is not None:
            folder.close()
    seconds = time.perf_counter() - start
    size = save(model, output, force=force)
    if calib is not None:
        folder.clear()
    state = state_of(model)
    ways = _ways(info, recipe, state.plan)
    return Conversion(
        spec, state.plan, source.preprocess, output, size, seconds, ways,
        state.history[-1].get("calibration"),
    )  # fmt: skip


def _stream(
    spec: str, model: nn.Module, source: Source, tensors: LazyWeights, recipe: Recipe,
    output: Path, force: bool, command: str | None, on_group: OnGroup | None,
) -> Conversion:  # fmt: skip
    """Convert weights that are read and written tensor by tensor."""
    info = inspect_model(model)
    start = time.perf_counter()
    with streamed(model, info, tensors, recipe, output, on_group) as best:
        seconds = time.perf_counter() - start
        history = (_entry(best.recipe, best.plan, command),)
        size = write_compact(
            output, best.plan, source.to_json(), history, best.tensor, force=force
        )  # fmt: skip
    ways = _ways(info, recipe, best.plan)
    return Conversion(spec, best.plan, source.preprocess, output, size, seconds, ways)


def _convert(
    model: nn.Module,
    source: Source,
    recipe: Recipe,
    command: str | None,
    on_group: OnGroup | None,
    calib: Calibration | None = None,
) -> nn.Module:
    data = None if calib is None else calib.open(source)
    record = source.to_json()
    if calib is None or data is None:
        fitted = fit_all(model, recipe, on_group)[0]
        bind(model, fitted, record)
        extra: dict[str, Any] = {}
    else:
        teacher = copy.deepcopy(model)  # before the fits, which may move the model's tensors
        found = finalists(model, teacher, recipe, on_group, calib, data, record)
        fitted, extra = calibrated(model, teacher, found, calib, data, record)
    entry = _entry(fitted.recipe, fitted.plan, command)
    set_state(model, history=({**entry, **extra},))
    return model


def _entry(recipe: Recipe, planned: Plan, command: str | None) -> dict[str, Any]:
    """What a file's history says of a conversion."""
    return {
        "step": "convert",
        "recipe": recipe.to_json(),
        "command": command,
        "original": planned.original,
        "stored": planned.stored,
        "versions": {"tiedconv": __version__, "torch": str(torch.__version__)},
    }


def _ways(info: ModelInfo, recipe: Recipe, planned: Plan) -> tuple[tuple[str, int], ...]:
    """What would store less, said where the reader may have hoped for more."""
    if recipe.budget is not None or planned.stored < 0.6 * planned.original:
        return ()
    return tuple(smaller_options(info, recipe))
