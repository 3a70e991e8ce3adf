"""The options of `convert` that say how small a model becomes, as a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.planning.recipe import Recipe


def make_recipe(
    scheme: str | None,
    params: str | None,
    size: str | None,
    bits: str | None,
    macs: str | None,
    rank: str | None,
    option: list[str] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    file: Path | None,
) -> Recipe:
    """The recipe that the options describe; a budget may be added to that of a file."""
    from tiedconv.planning.recipe import DEFAULT_SCHEME, Budget, Recipe, Rule

    if file is not None:
        if scheme or rank or option or include or exclude:
            raise UserError(
                "A recipe file and --scheme, --rank, --option, --include or --exclude were given",
                "They would contradict each other",
                "Write them into the file's rules",
                code="recipe-and-options",
            )
        read = Recipe.from_toml(file)
        budget = read.budget if params is None else Budget(params)
        work = read.macs if macs is None else Budget(macs, "macs")
        return Recipe(read.rules, budget, size or read.bytes, bits or read.bits, work).asked()
    options = {**_options(option), **({} if rank is None else {"rank": _rank(rank)})}
    rule = Rule(scheme or DEFAULT_SCHEME, options, tuple(include or ["*"]), tuple(exclude or []))
    budget = None if params is None else Budget(params)
    work = None if macs is None else Budget(macs, "macs")
    return Recipe((rule,), budget, size, bits, work).asked()


def _options(pairs: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"--option {pair!r} has no value",
                hint="Write it as --option groups=all",
                code="option-without-value",
            )
        options[name] = _value(value)
    return options


def _rank(text: str) -> Any:
    rank = _value(text)
    if isinstance(rank, float) and rank > 1:
        raise UserError(
            f"--rank {text} is neither an integer nor a fraction in (0, 1)",
            hint="Write it as --rank 16, or as --rank 0.2 for a fraction of each matrix",
            code="invalid-rank",
        )
    return rank


def _value(text: str) -> Any:
    """A JSON number, boolean or list, or else the text itself."""
    try:
        return json.loads(f"[{text}]" if "," in text and not text.startswith("[") else text)
    except json.JSONDecodeError:
        return text
