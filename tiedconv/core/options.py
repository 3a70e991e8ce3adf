"""Options of schemes as plain data, under their current names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiedconv.errors import SchemeError

# Former names of options of schemes, deprecated: files written before, recipes and users may still
# give them. No other place knows them.
RENAMED_OPTIONS: Mapping[str, str] = {"core": "base_rank"}


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a scheme under their current names.

    Raises:
        SchemeError: an option is given under both of its names.
    """
    for old, new in RENAMED_OPTIONS.items():
        if old in options and new in options:
            raise SchemeError(
                f"The options {old} and {new} are the same, and both were given",
                hint=f"Leave out {old}, the former name",
                code="option-given-twice",
            )
    return {RENAMED_OPTIONS.get(name, name): value for name, value in options.items()}
