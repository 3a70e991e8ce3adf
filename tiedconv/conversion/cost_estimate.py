"""What a recipe stores at least, and the estimated cost of its fit; each computed once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.utils.data import Dataset

from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import by_alignment, memory_store
from tiedconv.conversion.stages import carry_out
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.errors import NothingToConvert
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.planner import (
    alternatives,
    draft,
    least_stored,
    outline,
    parameters_of,
)
from tiedconv.planning.recipe import Recipe


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
        self._smallest: dict[str, int | None] = {}

    def smallest(self, recipe: Recipe) -> int | None:
        """The fewest parameters that a recipe can store at any budget, None if it does nothing.

        The same as a BudgetError tells, without the search for ways out that goes with it.
        """
        key = key_of(dataclasses.replace(recipe, budget=None))
        if key not in self._smallest:
            self._smallest[key] = self._least(recipe)
        return self._smallest[key]

    def feasible(self, recipe: Recipe) -> list[Recipe]:
        """Of a recipe with a budget and its alternatives, those that can meet it."""
        assert recipe.budget is not None
        budget = recipe.budget.resolve(self.original)
        return [
            wanted
            for wanted in alternatives(recipe)
            if (least := self.smallest(wanted)) is not None and least <= budget
        ]

    def _least(self, recipe: Recipe) -> int | None:
        try:
            return least_stored(self.info, draft(self.info, recipe))
        except NothingToConvert:
            return None


@dataclass(frozen=True)
class CostEstimate:
    """What the fit of a recipe stores, and its estimated cost: KL divergence in nats an image."""

    recipe: Recipe
    stored: int
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
            self._found[key] = CostEstimate(recipe, fitted.plan.stored, fitted.cost)
        return self._found[key]
