"""Carrying out a recipe and its alternatives, and keeping the best."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import nn
from torch.utils.data import Dataset

from tiedconv.conversion.calibrate import (
    Calibration,
    CandidateChosen,
    CandidateStarted,
    ResumedFits,
    calibration_record,
)
from tiedconv.conversion.fit import Fit, OnGroup
from tiedconv.conversion.fit_cache import identity_of, load_fits, save_fits
from tiedconv.conversion.stages import carry_out
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.conversion.symmetry_proof import SymmetryProof, first_image
from tiedconv.conversion.tensor_store import MemoryStore, TensorStore
from tiedconv.families.inspect import ModelInfo
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.planner import Outline
from tiedconv.runtime.example_inputs import Example
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import tie
from tiedconv.utils.stage import enter_part

SHORTLIST = 2
CLOSE = 1.5
"""A fit that costs more than so many times the best is not calibrated."""


def fit_candidates(
    info: ModelInfo,
    outlined: Sequence[Outline],
    store: TensorStore,
    cache: StatisticsCache | None = None,
    on_group: OnGroup | None = None,
    *,
    count: int = 1,
) -> list[Fit]:
    """The best fits of a recipe and its alternatives, least cost first.

    Costs are predictions, good for small errors, so a fit within `CLOSE` of the best may be the
    better one: with `count` above 1 such fits are returned too. Others are freed at once.

    Args:
        info: of the model.
        outlined: the recipe and its alternatives, from `planning.planner.outlines`.
        store: the weights.
        cache: measures statistics on images, if there are any.
        on_group: called with (groups fitted, groups in all), for each candidate.
        count: fits to return at most.
    """
    best = Shortlist[Fit](count, CLOSE)
    for number, i in enumerate(by_alignment(outlined), 1):
        enter_part(number, len(outlined))
        found = carry_out(info, outlined[i], store, cache, on_group)[0]
        best.add(found, found.cost, i)
    return best.entries


class Closable(Protocol):
    """What holds tensors until it is closed."""

    def close(self) -> None:
        """Let them go."""


E = TypeVar("E", bound=Closable)


class Shortlist(Generic[E]):
    """The best of what is added, the least cost first; all else is closed at once.

    Args:
        count: of entries that stay, at most.
        close: an entry that costs more than so many times the best does not stay.
    """

    def __init__(self, count: int, close: float) -> None:
        self._count, self._close = count, close
        self._found: list[tuple[float, int, E]] = []

    @property
    def entries(self) -> list[E]:
        """Those that stay."""
        return [entry for _, _, entry in self._found]

    @property
    def limit(self) -> float:
        """What costs more does not stay."""
        return self._close * self._found[0][0] if self._found else math.inf

    def add(self, entry: E, cost: float, order: int) -> None:
        """Add an entry; of equal costs the one of lower order is better."""
        self._found.append((cost, order, entry))
        self._found.sort(key=lambda found: found[:2])
        limit = self.limit
        stays = [n < self._count and found[0] <= limit for n, found in enumerate(self._found)]
        for found, stay in zip(self._found, stays, strict=True):
            if not stay:
                found[2].close()
        self._found = [found for found, stay in zip(self._found, stays, strict=True) if stay]


def by_alignment(outlined: Sequence[Outline]) -> list[int]:
    """Indices of outlines, those that align the weights alike one after the other.

    Those that leave the weights as they are come first: they share one set of statistics.
    """
    first: dict[object, int] = {}
    for i, outline in enumerate(outlined):
        first.setdefault(outline.alignment, i)
    return sorted(
        range(len(outlined)),
        key=lambda i: (outlined[i].aligns, first[outlined[i].alignment], i),
    )


def tie_fit(model: nn.Module, fitted: Fit, source: Mapping[str, Any]) -> None:
    """Make a plain model the tied one of a fit, in place."""
    own = {name: t.detach() for name, t in state_tensors(model).items()}
    for name in fitted.plan.kept:
        own[name].copy_(fitted.tensors[name])
    tie(model, fitted.plan, fitted.factors, source=source)


def memory_store(
    model: nn.Module,
    info: ModelInfo,
    example: Callable[[], Example | None] | None = None,
    *,
    in_place: bool = False,
) -> MemoryStore:
    """The weights of a model in memory, with the symmetries that are proven on it.

    Args:
        model: with its weights.
        info: of the model.
        example: gives an input of the model; None to try usual ones.
        in_place: align the model's own tensors.
    """
    own = {name: t.detach() for name, t in state_tensors(model).items()}
    return MemoryStore(
        {name: own[name] for name in info.shapes},
        in_place=in_place,
        allows=SymmetryProof(info, model, example),
    )


def shortlist(
    model: nn.Module,
    original: nn.Module,
    info: ModelInfo,
    outlined: Sequence[Outline],
    calib: Calibration,
    data: Dataset[Any],
    source: Mapping[str, Any],
    on_group: OnGroup | None = None,
) -> list[Fit]:
    """The fits to calibrate, best first: those of an interrupted run, or made now and saved.

    Args:
        model: plain; its own tensors are aligned where there is one candidate.
        original: a copy of the model.
        info: of the model.
        outlined: the recipe and its alternatives.
        calib, data: images.
        source: where the model came from.
        on_group: called with (groups fitted, groups in all).

    Raises:
        UserError: the run folder is of another calibration.
        DataError: no image could be read.
    """
    identity: dict[str, Any] = {}
    if calib.run_dir is not None:
        identity = identity_of(calib.config, outlined[0].recipe, original, data)
        recipes = [outline.recipe for outline in outlined]
        if calib.resume and (found := load_fits(calib.run_dir, recipes, identity)):
            calib.on_event(ResumedFits(len(found)))
            return found
    store = memory_store(model, info, lambda: first_image(data), in_place=len(outlined) == 1)
    cache = StatisticsCache(model, calib, data)
    count = SHORTLIST if calib.config.fits else 1
    found = fit_candidates(info, outlined, store, cache, on_group, count=count)
    if calib.run_dir is not None:
        if calib.resume:
            RunDir(calib.run_dir).require_fits(len(found))
        save_fits(calib.run_dir, found, source, identity)
    return found


def calibrate_shortlist(
    model: nn.Module,
    original: nn.Module,
    found: Sequence[Fit],
    calib: Calibration,
    data: Dataset[Any],
    source: Mapping[str, Any],
) -> tuple[Fit, dict[str, Any]]:
    """Tie a model by each of its fits, reconstruct it block by block, and keep the best, in place.

    Args:
        model: of the fits.
        original: a copy of it, from before its tensors were aligned.
        found: from `shortlist`.
        calib, data: images.
        source: where the model came from.

    Returns:
        the fit whose outputs diverge least, and the history's record of the calibration.
    """
    results: list[tuple[float, nn.Module, dict[str, Any]]] = []
    for i, fitted in enumerate(found):
        enter_part(i + 1, len(found))
        student = model if len(found) == 1 else copy.deepcopy(model)
        tie_fit(student, fitted, source)
        if len(found) > 1:
            schemes = tuple(sorted({group.scheme for group in fitted.plan.groups}))
            calib.on_event(CandidateStarted(i + 1, len(found), schemes))
        result = calib.part(i, len(found)).fit(student, original, data)
        student.cpu()
        record = calibration_record(fitted.ridge, result, calib, student, original)
        results.append((result.kl_after, student, record))
    best = min(range(len(results)), key=lambda i: results[i][0])
    _, student, record = results[best]
    if len(results) > 1:
        calib.on_event(CandidateChosen(best + 1, tuple(r[0] for r in results)))
    if student is not model:
        tie_fit(model, found[best], source)
        model.load_state_dict(student.state_dict())
    return found[best], {"calibration": record}
