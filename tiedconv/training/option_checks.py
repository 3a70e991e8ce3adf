"""Checks of the options of a training or a calibration."""

from __future__ import annotations

import math

from tiedconv.errors import UserError


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
