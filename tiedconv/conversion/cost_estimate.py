"""What a recipe stores at least, and what its fit costs on images; each found once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import KfacStatistics
from tiedconv.conversion.calibrate import Calibration
from tiedconv.errors import NothingToConvert
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.planner import (
    align,
    alternatives,
    draft,
    fit_plan,
    least_stored,
    make_plan,
    parameters_of,
    weights_of,
)
from tiedconv.planning.rank_allocation import KfacMetrics
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
    """What the fit of a recipe stores, and the cost that it leaves in nats for each image."""

    recipe: Recipe
    stored: int
    cost: float


class CostEstimator:
    """Fits recipes to a model's weights in the metric of images.

    Args:
        model: which is left as it is.
        info: of the model.
        calib: how the images are read.
        data: the images.
    """

    def __init__(
        self, model: nn.Module, info: ModelInfo, calib: Calibration, data: Dataset[Any]
    ) -> None:
        own = {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()}
        self._model, self._anatomy, self._calib, self._data = model, info, calib, data
        self._tensors = {name: own[name] for name in info.shapes}
        self._alignments: dict[str, str] = {}
        self._measured: tuple[str, KfacStatistics] | None = None
        self._prices: dict[str, CostEstimate] = {}
        self.images = 0  # that were measured on
        self.skipped = 0  # that could not be read

    @torch.no_grad()
    def alignment(self, recipe: Recipe) -> str:
        """The same for recipes that move the weights to the same place before they fit them.

        Only the statistics of the last place are kept, as they may take more memory than the model:
        ask for the prices of one place after the other.
        """
        key = key_of(dataclasses.replace(recipe, budget=None))
        if key not in self._alignments:
            digest = hashlib.sha256()
            for name, tensor in align(self._anatomy, recipe, self._tensors).items():
                if tensor is not self._tensors[name]:
                    digest.update(name.encode())
                    raw = tensor.cpu().contiguous().flatten().view(torch.uint8)
                    digest.update(raw.numpy().data)
            self._alignments[key] = digest.hexdigest()
        return self._alignments[key]

    def price(self, recipe: Recipe) -> CostEstimate:
        """The price of a recipe; raises what `make_plan` raises."""
        key = key_of(recipe)
        if key not in self._prices:
            self._prices[key] = self._fit(recipe)
        return self._prices[key]

    def _fit(self, recipe: Recipe) -> CostEstimate:
        metrics: KfacMetrics = {}

        def measure(moved: Mapping[str, Tensor]) -> KfacMetrics:
            nonlocal metrics
            metrics = self._moments(recipe, moved).metrics
            return metrics

        with torch.no_grad():
            planned, moved = make_plan(self._anatomy, recipe, self._tensors, measure=measure)
            planned, _, cost = fit_plan(planned, moved, metrics=metrics)
        return CostEstimate(recipe, planned.stored, cost)

    def _moments(self, recipe: Recipe, moved: Mapping[str, Tensor]) -> KfacStatistics:
        """What errors cost with the weights so moved."""
        place = self.alignment(recipe)
        if self._measured is not None and self._measured[0] == place:
            return self._measured[1]
        self._measured = None  # its memory is needed
        statistics = self._calib.measure(
            self._model, weights_of(self._anatomy, recipe), self._data, moved
        )
        self._measured = place, statistics
        self.images, self.skipped = statistics.images, statistics.skipped
        return statistics
