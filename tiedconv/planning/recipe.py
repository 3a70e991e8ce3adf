"""What the user wants: which scheme for which tensors, and how large the result may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tiedconv.core.options import current_options
from tiedconv.core.packed_codes import WIDTHS
from tiedconv.errors import RecipeError
from tiedconv.io.plain_file import read_toml
from tiedconv.planning.budget import (
    KEYS_OF_ON,
    Budget,
    RunsOn,
    Size,
    size_text,
)
from tiedconv.schemes import make_scheme

DEFAULT_SCHEME = "auto"
"""It needs no choice; without a budget it halves the model."""

_MOST = 2**20  # bytes of a recipe
_KEYS = {"params", "bytes", "bits", "macs", "latency", "rule", *KEYS_OF_ON}


@dataclass(frozen=True)
class Rule:
    """One scheme for the tensors whose names match.

    Args:
        scheme: its name.
        options: the scheme's options.
        include: glob patterns, one of which a tensor's name must match.
        exclude: glob patterns, none of which it may match.
    """

    scheme: str = DEFAULT_SCHEME
    options: Mapping[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        make_scheme(self.scheme, self.options)
        object.__setattr__(self, "options", current_options(self.options))

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name is meant."""
        return any(fnmatchcase(name, p) for p in self.include) and not any(
            fnmatchcase(name, p) for p in self.exclude
        )

    def chosen_by_a_budget(self) -> list[str]:
        """The options that are given here and that a budget would choose instead."""
        scheme = make_scheme(self.scheme, self.options)
        given, chosen = scheme.to_json(), scheme.with_residual_ranks((0,)).to_json()
        return [name for name in self.options if chosen[name] != given[name]]

    def without_patterns_matching(self, names: Iterable[str]) -> Rule:
        """The same rule with only those of its patterns that match none of these names.

        A pattern of stars alone names nothing, so it is left out in any case.
        """
        common = list(names)
        narrow = (
            p for p in self.include if p.strip("*") and not any(fnmatchcase(n, p) for n in common)
        )
        return dataclasses.replace(self, include=tuple(narrow))


@dataclass(frozen=True)
class Recipe:
    """Rules, tried in order for each tensor, and a budget for the whole model.

    Args:
        rules: which scheme for which tensors.
        budget: parameters that may be stored.
        bytes: that the file may take, such as `8%`, `700kB` or `2MB`: weights become integers.
        bits: of those integers, the most or `least:most`, such as `4` or `4:8`.
        macs: multiply-adds that a forward pass may take, with factors applied.
        latency: time that a forward pass may take on this machine, likewise.
        on: where the time is measured.

    The same as a TOML file:

        [[rule]]
        scheme = "lors"
        include = ["*attn*"]
        rank = 32
        k = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 6]
    """

    rules: tuple[Rule, ...] = (Rule(),)
    budget: Budget | None = None
    bytes: str | None = None
    bits: str | None = None
    macs: Budget | None = None
    latency: Budget | None = None
    on: RunsOn = field(default_factory=RunsOn)

    @property
    def work(self) -> Budget | None:
        """What a forward pass may take, in multiply-adds or nanoseconds."""
        return self.latency or self.macs

    @classmethod
    def of(
        cls,
        scheme: str = DEFAULT_SCHEME,
        *,
        params: Size | None = None,
        bytes: Size | None = None,
        bits: str | int | None = None,
        macs: Size | None = None,
        latency: Size | None = None,
        on: RunsOn | str = "onnx",
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        **options: Any,
    ) -> Recipe:
        """A recipe of one rule.

        Args:
            scheme: name of the scheme.
            params: parameters that may be stored: `0.5` or `50%` of the original's, or a number.
            bytes: of the file, likewise.
            bits: of an integer, at most.
            macs: multiply-adds of a forward pass, as `params`.
            latency: its time on this machine: `0.6`, `0.6x` or `60%` of the original's, or `8ms`.
            on: the runtime of that time, or with batch size and threads a `RunsOn`.
            include, exclude: glob patterns of tensor names.
            options: of the scheme.
        """
        # A text is one pattern, not a pattern for each of its letters: `*` would match all.
        include = (include,) if isinstance(include, str) else include
        exclude = (exclude,) if isinstance(exclude, str) else exclude
        rule = Rule(scheme, options, tuple(include) or ("*",), tuple(exclude))
        budget = None if params in (None, "") else Budget(size_text("params", params))
        size = None if bytes is None else size_text("bytes", bytes)
        work = None if macs is None else Budget(size_text("macs", macs), "macs")
        time = None if latency is None else Budget(size_text("latency", latency), "latency")
        where = RunsOn(on) if isinstance(on, str) else on
        width = None if bits is None else str(bits)
        return cls((rule,), budget, size, width, work, time, where).asked()

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        """The recipe of a TOML file.

        Raises:
            RecipeError: it can't be read, or holds a key that means nothing.
        """
        try:
            data = read_toml(path, _MOST)
        except (OSError, ValueError) as error:
            raise RecipeError(
                f"The recipe {path} can't be read ({error})",
                hint="Give a TOML file as docs/recipes.md shows",
                code="recipe-unreadable",
            ) from None
        unknown = data.keys() - _KEYS
        rules = data.get("rule", [])
        sound = isinstance(rules, list) and all(isinstance(rule, dict) for rule in rules)
        if unknown or not rules or not sound:
            what = f"has the unknown key {sorted(unknown)[0]!r}" if unknown else "has no [[rule]]"
            raise RecipeError(
                f"The recipe {path} {what}",
                hint="It takes params, bytes, bits, macs, latency, on and [[rule]] tables",
                code="recipe-malformed",
            )
        budget = Budget(str(data["params"])) if "params" in data else None
        size, bits = (str(data[k]) if k in data else None for k in ("bytes", "bits"))
        macs = Budget(str(data["macs"]), "macs") if "macs" in data else None
        time = Budget(str(data["latency"]), "latency") if "latency" in data else None
        on = RunsOn.from_json({k: data[k] for k in KEYS_OF_ON if k in data})
        rules = tuple(_rule(rule) for rule in rules)
        return cls(rules, budget, size, bits, macs, time, on).asked()

    def asked(self) -> Recipe:
        """The recipe, as someone asks for it now; histories hold older ones.

        Raises:
            RecipeError: it gives a rank that its budget would choose instead.
        """
        if self.bits is not None and self.bytes is None:
            raise RecipeError(
                f"bits={self.bits!r} was given without bytes",
                "Nothing would be rounded",
                "Give a budget of bytes too, such as 10%",
                code="bits-without-bytes",
            )
        _ = self.widths
        if self.macs is not None and self.latency is not None:
            raise RecipeError(
                "macs and latency were both given",
                "Each decides how much arithmetic there may be",
                "Give one of them",
                code="macs-and-latency",
            )
        for rule in self.rules if self.budget or self.work else ():
            if given := " and ".join(rule.chosen_by_a_budget()):
                raise RecipeError(
                    f"{given} of {rule.scheme} and a budget were both given",
                    "The budget chooses the ranks",
                    f"Leave out the budget, or {given}",
                    code="rank-and-budget",
                )
        return self

    @property
    def widths(self) -> tuple[int, int]:
        """The fewest and the most bits of an integer.

        Raises:
            RecipeError: `bits` names no width that there is (`invalid-bits`).
        """
        if self.bits is None:
            return WIDTHS[0], WIDTHS[-1]
        least, _, most = self.bits.rpartition(":")
        known = {str(width): width for width in WIDTHS}
        if most not in known or (least or "2") not in known or known[most] < known[least or "2"]:
            raise RecipeError(
                f"Invalid bits={self.bits!r}",
                hint=f"Give one of {', '.join(known)}, or two of them as 4:8",
                code="invalid-bits",
            )
        return known[least or "2"], known[most]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a file's history."""
        rules = [
            {
                "scheme": r.scheme,
                **r.options,
                "include": list(r.include),
                "exclude": list(r.exclude),
            }
            for r in self.rules
        ]
        budget = self.budget.text if self.budget else None
        work = self.macs.text if self.macs else None
        time = self.latency.text if self.latency else None
        sizes = {"bytes": self.bytes, "bits": self.bits, "macs": work, "latency": time}
        given = {name: text for name, text in sizes.items() if text is not None}
        on = self.on.to_json() if self.latency else {}
        return {"params": budget, **given, **on, "rules": rules}


def _rule(data: Mapping[str, Any]) -> Rule:
    options = dict(data)
    scheme = options.pop("scheme", DEFAULT_SCHEME)
    globs: list[tuple[str, ...]] = []
    for key, default in (("include", ["*"]), ("exclude", [])):
        value = options.pop(key, default)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise RecipeError(
                f"Invalid {key}={value!r} in a recipe: it is not a list of patterns",
                hint='Write it as ["*attn*", "*mlp*"]',
                code="patterns-invalid",
            )
        globs.append(tuple(value))
    return Rule(str(scheme), options, *globs)
