"""The options of `convert` that say how small and fast a model becomes, as a recipe."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tiedconv.cli import common
from tiedconv.cli.common import option_in
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.planning.recipe import Recipe

SIZE = "Size and schemes"
"""The part of the help on how small the file becomes, and by what."""
SPEED = "Speed"
"""The part of the help on how fast the model becomes."""


@dataclass(frozen=True)
class SpeedOptions:
    """How much a forward pass may take."""

    macs: Annotated[
        str | None,
        option_in(
            SPEED,
            "Choose ranks such that a forward pass takes at most so many multiply-adds: 60% or "
            "2.5G, with factors applied, as in ONNX files. With --params or --bytes both are kept.",
            metavar="BUDGET",
        ),
    ] = None
    latency: Annotated[
        str | None,
        option_in(
            SPEED,
            "The same for its time on this machine: 0.6x of the original's, or 8ms. Layers and "
            "a model of the plan are timed first; the file is timed at the end.",
            metavar="BUDGET",
        ),
    ] = None
    on: Annotated[
        str | None,
        option_in(
            SPEED,
            f"With --latency: the runtime, {' or '.join(common.names_in('timing/runtimes'))}. "
            "Default: onnx.",
            choices=common.names_in("timing/runtimes"),
        ),
    ] = None
    on_batch_size: Annotated[
        int | None, option_in(SPEED, "With --latency: images at a time. Default: 1.", min=1)
    ] = None
    on_threads: Annotated[
        int | None,
        option_in(SPEED, "With --latency: threads of the runtime. Default: 1.", min=1),
    ] = None

    def within(self, recipe: Recipe) -> Recipe:
        """A recipe with these limits too.

        Raises:
            UserError: a runtime without a time (`option-without-effect`).
        """
        from tiedconv.planning.budget import Budget

        given = {"runtime": self.on, "batch_size": self.on_batch_size, "threads": self.on_threads}
        where: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if where and self.latency is None and recipe.latency is None:
            raise UserError(
                "--on, --on-batch-size and --on-threads say where a time is measured",
                "Without --latency they have no effect",
                "Give --latency 0.6x too, or leave them out",
                code="option-without-effect",
            )
        return dataclasses.replace(
            recipe,
            macs=recipe.macs if self.macs is None else Budget(self.macs, "macs"),
            latency=recipe.latency if self.latency is None else Budget(self.latency, "latency"),
            on=dataclasses.replace(recipe.on, **where),
        ).asked()


def make_recipe(
    scheme: str | None,
    params: str | None,
    size: str | None,
    bits: str | None,
    speed: SpeedOptions,
    rank: str | None,
    option: list[str] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    file: Path | None,
) -> Recipe:
    """The recipe that the options describe; a budget may be added to that of a file."""
    from tiedconv.planning.budget import Budget
    from tiedconv.planning.recipe import DEFAULT_SCHEME, Recipe, Rule

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
        size, bits = size or read.bytes, bits or read.bits
        return speed.within(dataclasses.replace(read, budget=budget, bytes=size, bits=bits))
    options = {**_options(option), **({} if rank is None else {"rank": _rank(rank)})}
    rule = Rule(scheme or DEFAULT_SCHEME, options, tuple(include or ["*"]), tuple(exclude or []))
    budget = None if params is None else Budget(params)
    return speed.within(Recipe((rule,), budget, size, bits))


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
