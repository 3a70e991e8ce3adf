"""What a recipe stores at least, and the estimated cost of its fit; each computed once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from torch.utils.data import Dataset

from tiedconv.conversion.byte_plans import PlanForecast, forecast_plan
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import by_alignment, memory_store
from tiedconv.conversion.stages import carry_out
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.core.plan import Plan
from tiedconv.errors import NothingToConvert
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.drafting import Task, draft, parameters_of
from tiedconv.planning.feasibility import least_stored, least_work, workload_of
from tiedconv.planning.planner import Outline, alternatives, outline
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.macs import work_of


def key_of(recipe: Recipe) -> str:
    """The same for recipes that ask for the same."""
    return json.dumps(recipe.to_json(), sort_keys=True)


class Sizes:
    """Sizes that recipes can reach on one model.

    Args:
        info: of the model.
    """

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.original = parameters_of(info)
        self._tasks: dict[str, list[Task] | None] = {}
        self._smallest: dict[str, int] = {}
        self._fewest: dict[str, int] = {}

    def smallest(self, recipe: Recipe) -> int | None:
        """The fewest parameters that a recipe can store at any budget, None if it does nothing.

        The same as a BudgetError tells, without the search for ways out that goes with it.
        """
        return self._least(recipe, self._smallest, least_stored)

    def fewest_macs(self, recipe: Recipe) -> int | None:
        """The fewest multiply-adds that it can take, None if it does nothing or none are known."""
        work = self.info.workload
        if work is None:
            return None
        return self._least(recipe, self._fewest, lambda info, tasks: least_work(info, tasks, work))

    def feasible(self, recipe: Recipe) -> list[Recipe]:
        """Of a recipe with a budget and its alternatives, those that can meet it."""
        return [wanted for wanted in alternatives(recipe) if self._meets(wanted)]

    def macs(self, plan: Plan) -> int | None:
        """The multiply-adds of a plan, None where none are known."""
        work = self.info.workload
        return None if work is None else work_of(plan.weights, work)

    def _meets(self, recipe: Recipe) -> bool:
        limits: list[tuple[int | None, int]] = []
        if recipe.budget is not None:
            limits.append((self.smallest(recipe), recipe.budget.resolve(self.original)))
        if recipe.macs is not None and (work := workload_of(self.info, recipe)) is not None:
            limits.append((self.fewest_macs(recipe), recipe.macs.resolve(work.total)))
        return all(least is not None and least <= limit for least, limit in limits)

    def _least(
        self,
        recipe: Recipe,
        known: dict[str, int],
        least: Callable[[ModelInfo, Sequence[Task]], int],
    ) -> int | None:
        key = key_of(dataclasses.replace(recipe, budget=None, macs=None))
        if key not in self._tasks:
            try:
                self._tasks[key] = draft(self.info, recipe)
            except NothingToConvert:
                self._tasks[key] = None
        tasks = self._tasks[key]
        if tasks is not None and key not in known:
            known[key] = least(self.info, tasks)
        return known.get(key)


@dataclass(frozen=True)
class CostEstimate:
    """What the fit of a recipe takes, and its estimated cost: KL divergence in nats an image."""

    recipe: Recipe
    plan: Plan
    cost: float


class CostEstimator:
    """Fits recipes to a model's weights by statistics of images.

    Args:
        model: plain; it is left as it is.
        info: of the model.
        calib: how the images are read.
        data: the images.
    """

    def __init__(
        self, model: nn.Module, info: ModelInfo, calib: Calibration, data: Dataset[object]
    ) -> None:
        self._info = info
        self._store = memory_store(model, info, lambda: first_image(data))
        self._cache = StatisticsCache(model, calib, data)
        self._found: dict[str, CostEstimate] = {}

    @property
    def images(self) -> int:
        """Images that were measured on."""
        return self._cache.images

    @property
    def skipped(self) -> int:
        """Images that could not be read."""
        return self._cache.skipped

    def in_order(self, recipes: Iterable[Recipe]) -> list[Recipe]:
        """Each recipe once, those that align alike together: statistics are measured once."""
        each = list({key_of(recipe): recipe for recipe in recipes}.values())
        return [each[i] for i in by_alignment([outline(self._info, r) for r in each])]

    def estimate(self, recipe: Recipe) -> CostEstimate:
        """The estimate for a recipe; raises what `planning.planner.outline` raises."""
        key = key_of(recipe)
        if key not in self._found:
            outlined = outline(self._info, recipe)
            fitted = carry_out(self._info, outlined, self._store, self._cache)[0]
            self._found[key] = CostEstimate(recipe, fitted.plan, fitted.cost)
        return self._found[key]

    def forecast(self, outlined: Outline) -> PlanForecast:
        """What a plan costs when it is rounded; its tensors are let go."""
        found = forecast_plan(self._info, outlined, self._store, self._cache)
        found.fitted.close()
        return found
