"""Checks of the options of a training or a calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tiedconv.errors import UserError


def check_unused(
    config: object, usual: Mapping[str, Sequence[object]], used_for: str, what: str
) -> None:
    """Refuse options that a task has no use for, unless they are as usual.

    Args:
        config: the options.
        usual: the option's name to the values that change nothing.
        used_for: what the options are for, such as "classifiers".
        what: what has no such options.

    Raises:
        UserError: one of them was set (`option-for-classifiers`).
    """
    for option, values in usual.items():
        if getattr(config, option) not in values:
            raise UserError(
                f"{option}={getattr(config, option)} is for {used_for}",
                f"{what} has no such option",
                f"Leave --{option.replace('_', '-')} out",
                code="option-for-classifiers",
            )


def check_range(
    kind: str,
    name: str,
    value: float,
    low: float = 0,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises UserError (`invalid-KIND-option`) unless low <= value <= high, and it is finite.

    Args:
        kind: of the option, such as "training"; for the message.
        name: of the option.
        value: of the option.
        low: the smallest value.
        high: the largest value.
        open_low: whether `low` itself is excluded.
        open_high: whether `high` itself is excluded.
    """
    # Written so that NaN fails too.
    above = low < value if open_low else low <= value
    below = value < high if open_high else value <= high
    if above and below and value != math.inf:
        return
    rule = f"more than {low:g}" if open_low else f"{low:g} or more"
    bound = "" if high == math.inf else f" and {'less than' if open_high else 'at most'} {high:g}"
    raise UserError(
        f"The {kind} option {name} is {value}",
        hint=f"Choose {rule}{bound}",
        code=f"invalid-{kind}-option",
    )


def check_choice(kind: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError (`invalid-KIND-option`) unless the value is one of the choices."""
    if value not in choices:
        raise UserError(
            f"The {kind} option {name} is {value!r}",
            hint=f"Choose one of {', '.join(choices)}",
            code=f"invalid-{kind}-option",
        )
