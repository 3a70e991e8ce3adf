"""The verbs `plan` and `convert`: from a model to a tied one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tiedconv.calibration import CalibConfig
from tiedconv.commands.latency import in_time
from tiedconv.conversion.calibrate import Calibration, Images
from tiedconv.conversion.fit import OnGroup
from tiedconv.conversion.pipeline import (
    Planned,
    convert_in_memory,
    plan_on,
)
from tiedconv.conversion.workload import counted
from tiedconv.core.plan import Plan
from tiedconv.errors import UserError
from tiedconv.integrations import let_others_save
from tiedconv.planning.budget import RunsOn, Size
from tiedconv.planning.recipe import DEFAULT_SCHEME, Recipe
from tiedconv.runtime.example_inputs import Example
from tiedconv.sources import AS_PUBLISHED, Reading
from tiedconv.sources.models import open_model
from tiedconv.sources.published_weights import (
    Weights,
    preprocess_change,
)
from tiedconv.timing import TimeTable
from tiedconv.utils.typing import keeps_type


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
    found = None
    if wanted.work is not None:
        found = counted(network, opened.source, example, given)

    def planning(times: TimeTable | None) -> Planned:
        return plan_on(
            network, wanted, opened.source, example, measured=calib is not None,
            workload=None if found is None else found.workload,
            times=None if times is None else times.workload,
        )  # fmt: skip

    planned = in_time(network, found, wanted, planning)[0]
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
