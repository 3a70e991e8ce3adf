"""A conversion to a budget of bytes: how much to share, and in how many bits to store it.

Each plan (the whole model; schemes at several numbers of parameters) is fitted, and the cost of
rounding it to the budget is forecast. Both costs are in one unit (see `numerics.kfac_metric`), so
the plan with the least sum is taken, rounded and calibrated.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import BlockwiseResult, KfacStatistics
from tiedconv.conversion.calibrate import Calibration, calibration_record
from tiedconv.conversion.candidates import by_alignment, tie_fit
from tiedconv.conversion.fit import Fit, OnGroup, TooCostly
from tiedconv.conversion.random_images import random_images
from tiedconv.conversion.rounding import Forecast, RoundedModel, SizeOf, round_to_bytes
from tiedconv.conversion.stages import carry_out
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.tensor_store import TensorStore
from tiedconv.core.plan import Plan
from tiedconv.errors import TiedconvError
from tiedconv.families.inspect import ModelInfo
from tiedconv.io.checkpoint import file_size
from tiedconv.io.narrowing import halved
from tiedconv.planning.byte_budget import EACH, OVERHEAD, ByteBudget
from tiedconv.planning.planner import Outline
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.soft_codes import harden, soften
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of, untie
from tiedconv.sources import Source
from tiedconv.utils.stage import enter, enter_part

RECORD, RECORD_EACH = 200, 30
"""Bytes of a file that the record of a calibration takes, and for each of its blocks."""


@dataclass(frozen=True)
class Chosen:
    """The plan of the least cost.

    Args:
        fitted: its fit, in floats.
        metrics: of all weights, as it aligned them.
        forecast: its cost in all, at the budget.
        tried: how many plans there were.
    """

    fitted: Fit
    metrics: KfacStatistics | None
    forecast: float
    tried: int


@dataclass(frozen=True)
class PlanForecast:
    """A plan that is fitted, and what rounding it will cost.

    Args:
        fitted: its fit, in floats.
        statistics: of all weights, as it aligned them; None without images.
        forecast: of its rounding.
    """

    fitted: Fit
    statistics: KfacStatistics | None
    forecast: Forecast

    def cost_at(self, bytes_: int) -> float:
        """Nats for each image: of the fit, and of rounding it to so many bytes."""
        step = self.forecast.step_for(8 * (bytes_ - overhead(self.fitted.plan)))
        return self.fitted.cost + self.forecast.cost(step)


@torch.no_grad()
def forecast_plan(
    info: ModelInfo,
    outlined: Outline,
    store: TensorStore,
    cache: StatisticsCache | None,
    on_group: OnGroup | None = None,
    limit: float = math.inf,
) -> PlanForecast:
    """Fit a plan and forecast its rounding.

    Args:
        info: of the model.
        outlined: the plan.
        store: the weights.
        cache: measures statistics on images; None without any.
        on_group: called with (groups fitted, groups in all).
        limit: of the cost.

    Raises:
        TooCostly: the fit alone costs as much as `limit`.
    """
    found, statistics = carry_out(info, outlined, store, cache, on_group, limit)
    metrics = {} if statistics is None else statistics.metrics
    return PlanForecast(found, statistics, Forecast(found.plan, found.tensors, metrics))


@torch.no_grad()
def choose_plan(
    info: ModelInfo,
    outlined: tuple[Outline, ...],
    budget: ByteBudget,
    store: TensorStore,
    cache: StatisticsCache | None,
    on_group: OnGroup | None = None,
) -> Chosen:
    """Fit each plan, forecast its cost at the budget, and keep the best.

    Args:
        info: of the model.
        outlined: the plans.
        budget: of bytes.
        store: the weights.
        cache: measures statistics on images; None without any.
        on_group: called with (groups fitted, groups in all), for each plan.
    """
    best: Chosen | None = None
    for number, i in enumerate(by_alignment(outlined), 1):
        enter_part(number, len(outlined))
        limit = math.inf if best is None else best.forecast
        try:
            found = forecast_plan(info, outlined[i], store, cache, on_group, limit)
        except TooCostly:
            continue  # before any rounding it costs more than another plan with it
        cost = found.cost_at(budget.bytes)
        if best is None or cost < best.forecast:
            if best is not None:
                best.fitted.close()
            best = Chosen(found.fitted, found.statistics, cost, len(outlined))
        else:
            found.fitted.close()
    assert best is not None  # there is a plan, or the recipe was refused
    return best


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
        info, outlined, budget, store, on_group: see `choose_plan`.
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
    cache = _cache(model, source, calib, data)
    chosen = choose_plan(info, outlined, budget, store, cache, on_group)
    fitted, metrics = chosen.fitted, {} if chosen.metrics is None else chosen.metrics.metrics
    tie_fit(model, fitted, record)
    found: dict[str, Any] = {}
    if calib is not None and data is not None and fitted.plan.groups and calib.config.fits:
        enter("calibrate")
        calib.part(0, 3).fit(model, original, data)
        model.cpu()
        fitted = dataclasses.replace(fitted, tensors=_tensors(model, fitted.plan))
    blocks = 0 if calib is None else len({name.rpartition(".")[0] for name in info.shapes})
    spare = 0 if calib is None else RECORD + RECORD_EACH * min(blocks, 24)

    def size_of(plan: Plan, tensors: Mapping[str, Tensor]) -> int:
        return spare + file_size(plan, record, [history], tensors.__getitem__)

    enter("round")
    rounded = round_to_bytes(
        fitted.plan, fitted.tensors, metrics, budget.bytes, size_of, outlined[0].recipe.widths
    )
    untie(model)
    fitted = dataclasses.replace(fitted, plan=rounded.plan, tensors=rounded.tensors)
    tie_fit(model, fitted, record)
    found["rounding"] = _rounding_record(rounded, chosen, budget)
    if calib is not None and data is not None:
        enter("calibrate the rounded model")
        result = _calibrated(model, original, calib, data, size_of, budget)
        found["calibration"] = calibration_record(fitted.ridge, result, calib, model, original)
    return fitted, found


def _calibrated(
    model: nn.Module,
    original: nn.Module,
    calib: Calibration,
    data: Dataset[Any],
    size_of: SizeOf,
    budget: ByteBudget,
) -> BlockwiseResult:
    """Fit a rounded model to the original: its integers too, if the file stays within the budget.

    Trained integers have another distribution, and take more or fewer bits in the file.
    """
    plan = state_of(model).plan
    before = _tensors(model, plan)
    for train_integers in (True, False) if calib.config.fits else (False,):
        if train_integers:
            soften(model)
        result = calib.part(1 if train_integers else 2, 3).fit(model, original, data)
        model.cpu()
        if train_integers:
            harden(model)
        own = state_tensors(model)
        for tensor in own.values():
            tensor.data.copy_(halved(tensor.detach()))
        if size_of(plan, {name: own[name].detach() for name in before}) <= budget.bytes:
            return result
        for name, tensor in before.items():
            own[name].data.copy_(tensor)
    # No fit is kept, so none is reported.
    return dataclasses.replace(result, spans=(), kl_after=result.kl_before)


def _cache(
    model: nn.Module, source: Source, calib: Calibration | None, data: Dataset[Any] | None
) -> StatisticsCache | None:
    """What measures statistics: on the images, or on random ones; None where these fail."""
    if calib is not None and data is not None:
        return StatisticsCache(model, calib, data)
    wanted = source.preprocess
    size = native_size(model) or ((224, 224) if wanted is None else (wanted.size, wanted.size))
    random = random_images(size, 3 if wanted is None else wanted.channel_count())
    measuring = Calibration(random, workers=0)
    try:
        measuring.measure(model, {}, random)
    except TiedconvError:  # it takes no images, or gives no class logits
        return None
    return StatisticsCache(model, measuring, random)


def _tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    own = state_tensors(model)
    return {name: own[name].detach().clone() for name in (*plan.kept, *plan.factors)}


def _rounding_record(rounded: RoundedModel, chosen: Chosen, budget: ByteBudget) -> dict[str, Any]:
    return {
        "bytes": budget.bytes,
        "original_bytes": budget.original,
        "cost": rounded.cost,
        "fit_cost": chosen.fitted.cost,
        "plans": chosen.tried,
    }


def overhead(plan: Plan) -> int:
    """Bytes that a file takes beside the numbers of its tensors, about."""
    return OVERHEAD + EACH * len({**plan.kept, **plan.factors})


def bits_of(plan: Plan, bytes_: int) -> float:
    """Bits that each stored number of a plan has on average, in a file of so many bytes."""
    numbers = sum(math.prod(shape) for shape in {**plan.kept, **plan.factors}.values())
    return 8 * (bytes_ - overhead(plan)) / max(1, numbers)
