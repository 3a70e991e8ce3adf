"""Errors and predicted costs that a file records, tolerant of what it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedconv.commands.report import GroupReport


@dataclass(frozen=True)
class Calibrated:
    """A span of modules that was fitted to the original's.

    Args:
        modules: of the span.
        before, after: relative error of their output on held-out images.
    """

    modules: str
    before: float
    after: float


@dataclass(frozen=True)
class FitErrors:
    """What a file records of errors.

    Args:
        groups: those that have a fit error.
        largest: of their errors.
        weighted: whether errors are weighted by their effect on outputs for images.
        blocks: of the calibration.
        kl_before, kl_after: KL divergence of the outputs on held-out images, nats; None if not
            recorded.
        fit_cost, rounding_cost: predicted, in nats if `weighted`; None if not recorded.
    """

    groups: tuple[GroupReport, ...]
    largest: float
    weighted: bool
    blocks: tuple[Calibrated, ...]
    kl_before: float | None
    kl_after: float | None
    fit_cost: float | None
    rounding_cost: float | None


def errors_of(groups: Sequence[GroupReport], history: Sequence[Mapping[str, Any]]) -> FitErrors:
    """What the groups and the history of a file say of errors."""
    fitted = tuple(group for group in groups if group.error is not None)
    calibration = _last(history, "calibration")
    rounding = _last(history, "rounding")
    return FitErrors(
        groups=fitted,
        largest=max((group.error or 0.0 for group in fitted), default=0.0),
        weighted=bool(calibration),
        blocks=tuple(_blocks(calibration.get("blocks"))),
        kl_before=number(calibration.get("kl_before")),
        kl_after=number(calibration.get("kl_after")),
        fit_cost=number(rounding.get("fit_cost")),
        rounding_cost=number(rounding.get("cost")),
    )


def number(value: object) -> float | None:
    """A number of a history, which is finite; None for anything else."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if real else None  # type: ignore[arg-type]


def _last(history: Sequence[Mapping[str, Any]], key: str) -> Mapping[str, Any]:
    found = [entry[key] for entry in history if isinstance(entry.get(key), Mapping)]
    return found[-1] if found else {}


def _blocks(recorded: object) -> Iterator[Calibrated]:
    for entry in recorded if isinstance(recorded, list) else []:
        match entry:
            case [[*units], int() | float() as before, int() | float() as after]:
                names = ", ".join(str(unit) or "the whole model" for unit in units)
                yield Calibrated(names, float(before), float(after))
