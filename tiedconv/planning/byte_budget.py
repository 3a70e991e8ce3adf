"""A budget of bytes, and which plans may meet it best."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from tiedconv.errors import BudgetError, NothingToConvert, RecipeError
from tiedconv.families.inspect import ModelInfo
from tiedconv.planning.budget import Budget
from tiedconv.planning.drafting import compile_plan, parameters_of
from tiedconv.planning.planner import Outline, outlines
from tiedconv.planning.recipe import Recipe
from tiedconv.schemes import make_scheme

SHARES = (70, 50, 30, 20, 10)
"""Percentages of the parameters that are tried, where schemes are open."""

FEWEST_BITS, MOST_BITS = 2.0, 5.0
"""For each parameter left. With more, fewer parameters in more bits each are the worse choice."""

OVERHEAD, EACH = 1_500, 30
"""Bytes that a file takes beside its tensors, and for each of them: a first guess."""


@dataclass(frozen=True)
class ByteBudget:
    """What a file may take, resolved for a model.

    Args:
        bytes: of the file.
        original: bytes of the original's tensors, in their own type.
    """

    bytes: int
    original: int


def byte_budget(text: str, original: int) -> ByteBudget:
    """The budget of a text such as `8%`, `700kB` or `2MB`.

    Args:
        text: a percentage of the original's bytes, or a number of bytes; 1 kB is 1,000 bytes.
        original: bytes of the original's tensors, in their own type.

    Raises:
        RecipeError: it is neither (`invalid-bytes`), or no less than the original
            (`budget-saves-nothing`).
    """
    share, count = parsed_bytes(text)
    bytes_ = int(original * share / 100) if share is not None else int(count)
    if bytes_ >= original:
        raise RecipeError(
            f"bytes={text!r} is not less than the {original:,} bytes of the original",
            "Nothing would be saved",
            "Give less, such as 10%",
            code="budget-saves-nothing",
        )
    return ByteBudget(bytes_, original)


def parsed_bytes(text: str) -> tuple[float | None, float]:
    """The percentage, or None and the number of bytes.

    Raises:
        RecipeError: it is neither (`invalid-bytes`).
    """
    plain = text.strip().replace("_", "").replace(",", "").lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", plain):
        if 0 < (share := float(match[1])) <= 100:
            return share, 0.0
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b", plain):
        count = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2]]
        if count >= 1:
            return None, count
    raise RecipeError(
        f"Invalid budget bytes={text!r}",
        hint="Give a percentage of the original's bytes such as 10%, or a size such as 2MB",
        code="invalid-bytes",
    )


def byte_outlines(info: ModelInfo, recipe: Recipe, budget: ByteBudget) -> tuple[Outline, ...]:
    """The plans whose rounded files may be the best of a size.

    Where the schemes are open, that of the whole model (of as few multiply-adds as it may take, if
    these are limited), and those of fewer parameters that leave
    each of them enough bits. Else what the recipe says.

    Args:
        info: of the model.
        recipe: with a budget of bytes.
        budget: resolved for the model.

    Raises:
        NothingToConvert, BudgetError: the recipe can't be carried out.
    """
    is_open = all(len(make_scheme(r.scheme, r.options).candidates()) > 1 for r in recipe.rules)
    others = matrices_of(info)
    if not is_open or recipe.budget is not None:
        found = list(outlines(info, recipe))
    else:
        found = _unbound(info, recipe)
        average = 8 * budget.bytes / max(1, parameters_of(info))
        for share in SHARES:
            if not FEWEST_BITS <= 100 * average / share <= MOST_BITS:
                continue
            try:
                found += outlines(info, dataclasses.replace(recipe, budget=Budget(f"{share}%")))
            except (BudgetError, NothingToConvert):
                continue
    return tuple(dataclasses.replace(one, rounded=others) for one in found)


def _unbound(info: ModelInfo, recipe: Recipe) -> list[Outline]:
    """The plans that no number of parameters limits: the whole model, or for few multiply-adds."""
    if recipe.work is None:
        return [Outline(recipe, (), None, compile_plan(info, []))]
    return list(outlines(info, recipe))


def matrices_of(info: ModelInfo) -> dict[str, bool]:
    """Every weight that may become integers, and whether it is stored as `(in, out)`."""
    slots = [slot for _, block in info.blocks for slot in block.slots.values()]
    transposed = {slot.tensor for slot in slots if slot.transposed}
    return {
        name: name in transposed
        for name, shape in info.parameters.items()
        if len(shape) > 1 and name not in info.fixed
    }
