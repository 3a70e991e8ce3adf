"""Carrying recipes out on a model: each is planned and fitted, and the best is kept."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import KfacStatistics
from tiedconv.conversion.calibrate import Calibration, Finalist, FoundFits, Kept, calibration_record
from tiedconv.conversion.fit_cache import Fit, identity_of, keep, kept
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.planner import alternatives, fit_plan, make_plan, weights_of
from tiedconv.planning.rank_allocation import KfacMetrics
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.tie import tie

FINALISTS = 2
CLOSE = 1.5
"""A fit that costs more than so many times the best is not calibrated."""

T = TypeVar("T")
OnGroup = Callable[[int, int], None]


def fit_all(
    model: nn.Module,
    recipe: Recipe,
    on_group: OnGroup | None = None,
    calib: Calibration | None = None,
    data: Dataset[Any] | None = None,
) -> list[Fit]:
    """The fits of a recipe and of what its scheme wants tried beside it, least cost first.

    Args:
        model: plain; with a single recipe its own tensors are moved, which saves their size.
        recipe: what is wanted.
        on_group: called with (groups fitted, groups in all).
        calib, data: images, if there are any.

    Raises:
        NothingToConvert, BudgetError: no recipe can be carried out.
    """
    info = inspect_model(model)
    own = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}
    tensors = {name: own[name] for name in info.shapes}
    recipes = alternatives(recipe)
    trial = _Trial(model, info, tensors, len(recipes) == 1, on_group, calib, data)
    return sorted(tried(recipes, trial.fit), key=lambda fit: fit.cost)


def tried(recipes: Sequence[Recipe], fit: Callable[[Recipe], T]) -> Iterator[T]:
    """What a recipe and its alternatives give, one after the other, of those that can be.

    Args:
        recipes: from `alternatives`, the recipe itself first.
        fit: carries one out; raises what the planner raises.

    Raises:
        NothingToConvert, BudgetError: no recipe can be carried out.
    """
    none = True
    refused: list[BudgetError] = []
    for wanted in recipes:
        try:
            found = fit(wanted)
        except BudgetError as error:
            refused.append(error)
        except NothingToConvert:
            if wanted is recipes[0]:
                raise
        else:
            none = False
            yield found
    if none:
        raise min(refused, key=lambda error: error.smallest)


def bind(model: nn.Module, fitted: Fit, source: Mapping[str, Any]) -> None:
    """Make a model the tied one of a fit, in place."""
    own = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}
    for name in fitted.plan.kept:
        own[name].copy_(fitted.moved[name])
    tie(model, fitted.plan, fitted.factors, source=source)


def finalists(
    model: nn.Module,
    original: nn.Module,
    recipe: Recipe,
    on_group: OnGroup | None,
    calib: Calibration,
    data: Dataset[Any],
    source: Mapping[str, Any],
) -> list[Fit]:
    """The fits that blocks are fitted to, best first: those kept, or made now and kept.

    Costs are predictions, good for small errors. Where blocks are fitted too, the two best fits
    go through it, unless one is far ahead.

    Args:
        model, recipe, on_group, calib, data: as of `fit_all`.
        original: a copy of the model, which `fit_all` may move.
        source: where the model came from.

    Raises:
        NothingToConvert, BudgetError: no recipe can be carried out.
        UserError: what is kept is of another calibration.
    """
    identity: dict[str, Any] = {}
    if calib.run_dir is not None:
        identity = identity_of(calib.config, recipe, original, data)
        if calib.resume and (found := kept(calib.run_dir, alternatives(recipe), identity)):
            calib.on_event(FoundFits(len(found)))
            return found
    found = fit_all(model, recipe, on_group, calib, data)
    near = [fit for fit in found if fit.cost <= CLOSE * found[0].cost]
    chosen = near[:FINALISTS] if calib.config.fits else near[:1]
    if calib.run_dir is not None:
        if calib.resume:
            RunDir(calib.run_dir).require_fits(len(chosen))
        keep(calib.run_dir, chosen, source, identity)
    return chosen


def calibrated(
    model: nn.Module,
    teacher: nn.Module,
    found: Sequence[Fit],
    calib: Calibration,
    data: Dataset[Any],
    source: Mapping[str, Any],
) -> tuple[Fit, dict[str, Any]]:
    """Tie a model by each of its fits, fit the blocks, and keep what diverges least, in place.

    Args:
        model: of the fits.
        teacher: the original, copied before the fits, which may move the model's tensors.
        found: from `finalists`.
        calib, data: images.
        source: where the model came from.

    Returns:
        the fit that was kept, and what the history says of the calibration.
    """
    results: list[tuple[float, Fit, nn.Module, dict[str, Any]]] = []
    for i, fitted in enumerate(found):
        student = model if len(found) == 1 else copy.deepcopy(model)
        bind(student, fitted, source)
        if len(found) > 1:
            schemes = tuple(sorted({group.scheme for group in fitted.plan.groups}))
            calib.on_event(Finalist(i + 1, len(found), schemes))
        result = calib.part(i, len(found)).fit(student, teacher, data)
        student.cpu()
        record = calibration_record(fitted.ridge, result, calib)
        results.append((result.kl_after, fitted, student, record))
    best = min(range(len(results)), key=lambda i: results[i][0])
    _, fitted, student, record = results[best]
    if len(results) > 1:
        calib.on_event(Kept(best + 1, tuple(r[0] for r in results)))
    if student is not model:
        bind(model, fitted, source)
        model.load_state_dict(student.state_dict())
    return fitted, {"calibration": record}


@dataclass
class _Trial:
    """What every recipe that is tried on a model has in common."""

    model: nn.Module
    info: ModelInfo
    tensors: Mapping[str, Tensor]
    in_place: bool
    on_group: OnGroup | None
    calib: Calibration | None
    data: Dataset[Any] | None
    measured: list[tuple[Mapping[str, Tensor], KfacStatistics]] = dataclasses.field(
        default_factory=list
    )

    def fit(self, recipe: Recipe) -> Fit:
        """The recipe carried out; raises what the planner raises."""
        statistics: KfacStatistics | None = None

        def measure(moved: Mapping[str, Tensor]) -> KfacMetrics:
            nonlocal statistics
            statistics = self._moments(recipe, moved)
            return statistics.metrics

        with torch.no_grad():
            planned, moved = make_plan(
                self.info, recipe, self.tensors, in_place=self.in_place,
                measure=measure if self.calib is not None else None,
            )  # fmt: skip
            metrics = statistics.metrics if statistics is not None else None
            planned, factors, cost = fit_plan(planned, moved, self.on_group, metrics)
        ridge = None if statistics is None else statistics.ridge
        return Fit(recipe, planned, moved, factors, cost, ridge)

    def _moments(self, recipe: Recipe, moved: Mapping[str, Tensor]) -> KfacStatistics:
        """What errors cost with the weights so moved, measured once."""
        for before, statistics in self.measured:
            if all(torch.equal(before[n], t) for n, t in moved.items()):
                return statistics
        assert self.calib is not None
        assert self.data is not None
        statistics = self.calib.measure(self.model, weights_of(self.info, recipe), self.data, moved)
        self.measured.append((moved, statistics))
        return statistics
