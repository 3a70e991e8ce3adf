"""JSON texts: strict reading of untrusted ones, and plain data for writing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Far above any model's, far below what could harm a reader.
MAX_VALUES = 200_000
MAX_NESTING = 64
MAX_NUMBER = 2**63


def strict_json(text: str, max_values: int = MAX_VALUES) -> Any:
    """The data of an untrusted JSON text.

    Args:
        text: of any origin.
        max_values: largest number of values in it.

    Raises:
        ValueError: it is not JSON, repeats a key, holds a number that is not finite or a text
            that is not Unicode, or is deeper or larger than any plan.
    """
    if sum(map(text.count, ",[{")) > max_values:  # before Python makes objects of them
        raise ValueError(f"it holds more than {max_values:,} values")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_NESTING} levels") from None
    level, depth = [data], 0
    while level:
        if depth > MAX_NESTING:
            raise ValueError(f"it is nested deeper than {MAX_NESTING} levels")
        level, depth = _level_below(level), depth + 1
    return data


def compact_json(data: Any) -> str:
    """Data as JSON without spaces, its keys sorted: equal data give equal texts.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_ready(value: Any) -> Any:
    """Plain data for strict JSON: dataclasses become objects, numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        names += [n for n, kind in vars(type(value)).items() if isinstance(kind, property)]
        return {name: json_ready(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _level_below(level: list[Any]) -> list[Any]:
    """The values one level deeper, after a check of the texts and numbers of this level."""
    below: list[Any] = []
    for value in level:
        kind = type(value)
        if kind is str:
            if not value.isascii():
                value.encode()  # an unpaired surrogate is a ValueError
        elif kind is list:
            below += value
        elif kind is dict:
            below += value  # the keys
            below += value.values()
        elif kind in (int, float) and not -MAX_NUMBER < value < MAX_NUMBER:
            raise ValueError("it holds a number that is not finite, or too large")
    return below


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("it repeats a key")
    return found


def _not_finite(constant: str) -> Any:
    raise ValueError(f"{constant} is not a finite number")
