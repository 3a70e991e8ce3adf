"""Matching the names in a weights file to those of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")

# What wrappers and training programs put before the names of a model's own.
_PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "ema.",
    "ema_model.",
    "net.",
    "network.",
    "encoder.",
    "backbone.",
    "teacher.",
    "student.",
    "model_ema.",
    "base_model.",
)
_COMPILED = "_orig_mod."
_MOST_TRIED = 100


def match_names(named: Mapping[str, T], wanted: Mapping[str, object]) -> dict[str, T]:
    """Drops the prefixes that keep names from matching, and no others.

    Args:
        named: values by their names in the file.
        wanted: the model's names.

    Returns:
        The values under the names that match best; of equal ones, the least changed.
    """
    candidates = [{name: name for name in named}]  # new name -> name in the file
    if _score(candidates[0], wanted) < len(wanted):
        for renaming in candidates:  # grows while it is read: prefixes are dropped one by one
            candidates += [new for new in _one_step(renaming) if new not in candidates]
            if len(candidates) > _MOST_TRIED:
                break
    best = max(candidates, key=lambda renaming: _score(renaming, wanted))
    return {new: named[old] for new, old in best.items()}


def _one_step(renaming: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The renamings that drop one prefix more."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in renaming):
            shorter = {name.removeprefix(prefix): old for name, old in renaming.items()}
            if len(shorter) == len(renaming):  # else two tensors would share a name
                yield shorter
    if any(_COMPILED in name for name in renaming):  # a compiled part has it within its names
        shorter = {name.replace(_COMPILED, ""): old for name, old in renaming.items()}
        if len(shorter) == len(renaming):
            yield shorter


def _score(renaming: Mapping[str, str], wanted: Mapping[str, object]) -> int:
    return sum(name in wanted for name in renaming)
