"""A conversion to a budget of bytes: how much to share, and in how many bits to store it.

Each plan (the whole model; schemes at several numbers of parameters) is fitted, and the cost of
rounding it to the budget is forecast. Both costs are in one unit (see `numerics.kfac_metric`), so
the plan with the least sum is taken, rounded and calibrated. Where several come close, each is
rounded, and another one is taken where the outputs on the images speak for it. Outputs also decide
how far rounding trusts the measured inputs.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import BlockwiseResult
from tiedconv.calibration.output_divergence import is_clearly_less
from tiedconv.conversion.byte_plans import Chosen, choose_plans
from tiedconv.conversion.calibrate import Calibration, calibration_record
from tiedconv.conversion.candidates import tie_fit
from tiedconv.conversion.fit import Fit, OnGroup
from tiedconv.conversion.ridged_metrics import RIDGES, RidgedMetrics
from tiedconv.conversion.rounded_model import RoundedModel, SizeOf
from tiedconv.conversion.rounding import round_to_bytes
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.tensor_store import TensorStore
from tiedconv.core.plan import Plan
from tiedconv.data import Normalization, TensorList, random_shapes
from tiedconv.errors import BudgetError, TiedconvError
from tiedconv.families.inspect import ModelInfo
from tiedconv.io.checkpoint import file_size
from tiedconv.io.narrowing import halved
from tiedconv.planning.byte_budget import ByteBudget
from tiedconv.planning.planner import Outline
from tiedconv.planning.rank_allocation import KfacMetrics
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.soft_codes import harden, soften
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of, untie
from tiedconv.sources import Preprocess, Source
from tiedconv.utils.stage import enter

RECORD, RECORD_EACH = 200, 30
"""Bytes of a file that the record of a calibration takes, and for each of its blocks."""

SLACK = 32
"""Bytes for numbers of the history that get another digit, such as multiply-adds."""

LONGEST = -1.2345678901234567e-100
"""A number with as many digits as any in a file's history."""


FEWEST, MOST, PIXELS = 32, 128, 2**19
"""Images at random, where no others are given: as many as have so many pixels, between these."""

Judged = tuple[RoundedModel, Tensor]
"""A rounding, and how far the outputs are from the original's, for each batch of images."""

GROWTH = 0.004
"""Of the budget, what is left free for integers that are trained: they take more bits then, and to
make them smaller again raised the divergence by a third (a ResNet at 4 %)."""

COMPARED = 3
"""Plans, at most, that are rounded and compared by the model's outputs."""


def convert_to_bytes(
    model: nn.Module,
    info: ModelInfo,
    outlined: tuple[Outline, ...],
    budget: ByteBudget,
    store: TensorStore,
    source: Source,
    history: Mapping[str, Any],
    calib: Calibration | None,
    data: Dataset[Any] | None,
    on_group: OnGroup | None = None,
) -> tuple[Fit, dict[str, Any]]:
    """Convert a model such that its file takes at most so many bytes, in place.

    Args:
        model: plain, with its weights.
        info, outlined, budget, store, on_group: see `byte_plans.choose_plans`.
        source: where the model came from.
        history: what the file's history will say of the conversion, but for the calibration.
        calib, data: images, if there are any.

    Returns:
        the fit that was taken, its plan with integers, and what else the history says.

    Raises:
        BudgetError: the budget can't be met (`budget-too-small`).
        DataError: no image could be read.
    """
    original, record = copy.deepcopy(model), source.to_json()
    cache = _cache(original, source, calib, data)  # the model itself is changed below
    most = 1 if cache is None else COMPARED
    plans, tried = choose_plans(info, outlined, budget, store, cache, on_group, most)
    blocks = 0 if calib is None else len({name.rpartition(".")[0] for name in info.shapes})
    spare = SLACK if calib is None else RECORD + RECORD_EACH * min(blocks, 24)

    def size_of(fitted: Fit) -> SizeOf:
        longest = {
            "bytes": budget.bytes, "original_bytes": budget.original, "cost": LONGEST,
            "fit_cost": LONGEST, "plans": tried,
        }  # fmt: skip
        said = {**history, "symmetries": fitted.symmetries, "rounding": longest}

        def size(plan: Plan, tensors: Mapping[str, Tensor]) -> int:
            entry = {**said, "stored": plan.stored}
            return spare + file_size(plan, record, [entry], tensors.__getitem__)

        return size

    trains = calib is not None and data is not None and calib.config.fits

    def round_(fitted: Fit, metrics: KfacMetrics) -> RoundedModel:
        recipe = outlined[0].recipe

        def within(most: int) -> RoundedModel:
            return round_to_bytes(
                fitted.plan, fitted.tensors, metrics, most, size_of(fitted), recipe.widths,
                floats=recipe.bits is None,
            )  # fmt: skip

        if trains:
            with contextlib.suppress(BudgetError):
                return within(math.floor((1 - GROWTH) * budget.bytes))
        return within(budget.bytes)

    chosen, judged = _best(original, plans, round_, cache)
    fitted = chosen.fitted
    tie_fit(model, fitted, record)
    if calib is not None and data is not None and fitted.plan.groups and calib.config.fits:
        enter("calibrate")
        calib.part(0, 3).fit(model, original, data)
        model.cpu()
        fitted = dataclasses.replace(fitted, tensors=_tensors(model, fitted.plan))
        judged = None  # of the fit before
    enter("round")
    chosen = dataclasses.replace(chosen, fitted=fitted)
    rounded = _with_ridge(original, chosen, judged, round_, cache)
    untie(model)
    fitted = dataclasses.replace(fitted, plan=rounded.plan, tensors=rounded.tensors)
    tie_fit(model, fitted, record)
    found: dict[str, Any] = {"rounding": _rounding_record(rounded, chosen, budget, tried)}
    if calib is not None and data is not None and cache is not None:
        enter("calibrate the rounded model")
        result = _calibrated(model, original, calib, data, size_of(fitted), budget, cache)
        found["calibration"] = calibration_record(fitted.ridge, result, calib, model, original)
    return fitted, found


def _best(
    original: nn.Module,
    plans: Sequence[Chosen],
    round_: Callable[[Fit, KfacMetrics], RoundedModel],
    cache: StatisticsCache | None,
) -> tuple[Chosen, Judged | None]:
    """The plan of the least forecast, unless another's outputs are clearly nearer; how it rounds.

    Where there is one plan, it is not rounded. Others are closed.
    """
    if len(plans) == 1 or cache is None:
        return plans[0], None
    best: tuple[Tensor, Chosen, RoundedModel] | None = None
    refused: list[BudgetError] = []
    for chosen in plans:
        try:
            rounded = round_(chosen.fitted, chosen.metrics)
        except BudgetError as error:
            refused.append(error)
            continue
        found = _divergences(original, chosen.fitted, rounded, cache)
        if best is None or is_clearly_less(found, best[0]):
            best = found, chosen, rounded
    if best is None:
        raise min(refused, key=lambda error: error.smallest)
    for chosen in plans:
        if chosen is not best[1]:
            chosen.close()
    return best[1], (best[2], best[0])


def _with_ridge(
    original: nn.Module,
    chosen: Chosen,
    judged: Judged | None,
    round_: Callable[[Fit, KfacMetrics], RoundedModel],
    cache: StatisticsCache | None,
) -> RoundedModel:
    """The rounding whose outputs are nearest: the usual, or with measured inputs trusted less."""
    rounded, found = judged or (round_(chosen.fitted, chosen.metrics), None)
    if cache is None or not RIDGES:
        return rounded
    if found is None:
        found = _divergences(original, chosen.fitted, rounded, cache)
    best = found.mean()
    for ridge in RIDGES:
        try:
            other = round_(chosen.fitted, RidgedMetrics(chosen.metrics, ridge))
        except BudgetError:
            break
        error = _divergences(original, chosen.fitted, other, cache).mean()
        if not error < best:
            break
        best, rounded = error, other
    return rounded


def _divergences(
    original: nn.Module, fitted: Fit, rounded: RoundedModel, cache: StatisticsCache
) -> Tensor:
    model = copy.deepcopy(original)
    tie_fit(model, dataclasses.replace(fitted, plan=rounded.plan, tensors=rounded.tensors), {})
    return cache.divergences(model)


def _calibrated(
    model: nn.Module,
    original: nn.Module,
    calib: Calibration,
    data: Dataset[Any],
    size_of: SizeOf,
    budget: ByteBudget,
    cache: StatisticsCache,
) -> BlockwiseResult:
    """Fit a rounded model to the original: its integers too, if the file stays within the budget.

    Trained integers have another distribution, and may take more bits in the file: then some of
    them are rounded towards zero, and outputs must still be nearer than before. Where little is
    lost, steps of integers are too coarse to gain anything; then the floats alone are fitted.
    """
    plan = state_of(model).plan
    before = _tensors(model, plan)
    trainable = calib.config.fits and bool(plan.codes)

    def fits() -> bool:
        own = state_tensors(model)
        return size_of(plan, {n: halved(own[n].detach()) for n in before}) <= budget.bytes

    for train_integers in (True, False) if trainable else (False,):
        if train_integers:
            lost = cache.divergences(model).mean()
            soften(model)
        result = calib.part(1 if train_integers else 2, 3).fit(model, original, data)
        model.cpu()
        kept = harden(model, fits) if train_integers else fits()
        own = state_tensors(model)
        for tensor in own.values():
            tensor.data.copy_(halved(tensor.detach()))
        if kept and train_integers:
            kept = result.gained and bool(cache.divergences(model).mean() < lost)
        if kept:
            return result
        for name, tensor in before.items():
            own[name].data.copy_(tensor)
    # No fit is kept, so none is reported.
    return dataclasses.replace(result, spans=(), kl_after=result.kl_before, gained=False)


def _cache(
    model: nn.Module, source: Source, calib: Calibration | None, data: Dataset[Any] | None
) -> StatisticsCache | None:
    """What measures statistics: on the images, or on random ones; None where these fail."""
    if calib is not None and data is not None:
        return StatisticsCache(model, calib, data)
    wanted = source.preprocess or Preprocess(224)
    size = native_size(model) or (wanted.size, wanted.size)
    count = min(MOST, max(FEWEST, PIXELS // math.prod(size)))
    normalization, labels = Normalization(wanted.mean, wanted.std), torch.zeros(count).long()
    drawn = (random_shapes(count, size, wanted.channel_count(), seed=seed) for seed in (0, 1))
    random, others = (TensorList(normalization.to_unit(pixels), labels) for pixels in drawn)
    measuring = Calibration("random", workers=0)
    try:
        measuring.measure(model, {}, random)
    except TiedconvError:  # it takes no images, or gives no class logits
        return None
    return StatisticsCache(model, measuring, random, others)


def _tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    own = state_tensors(model)
    return {name: own[name].detach().clone() for name in plan.tensors}


def _rounding_record(
    rounded: RoundedModel, chosen: Chosen, budget: ByteBudget, tried: int
) -> dict[str, Any]:
    return {
        "bytes": budget.bytes,
        "original_bytes": budget.original,
        "cost": rounded.cost,
        "fit_cost": chosen.fitted.cost,
        "plans": tried,
    }
