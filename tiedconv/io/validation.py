"""Checks of the plan, history and source of an untrusted file.

A file's hashes show that it is complete, not that it is honest: a forged plan can be hashed again.
So nothing of it is evaluated before it is known to be small, of the right types, and consistent
with the file's tensors. Limits are relative to what the file stores and computes, with ample room
for what the schemes write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tiedconv.core.plan import Group, Plan
from tiedconv.core.storage import quantised_shape
from tiedconv.errors import PlanError
from tiedconv.runtime.flops import eval_flops

MAX_WEIGHTS = 5_000  # likewise groups and aliases
MAX_ENTRIES = 1_000  # of a history
MAX_TEXT = 100_000  # characters
MAX_ERROR = 1e9
MAX_SOURCE = 20_000  # characters of JSON, but for the configuration
MAX_ARGUMENT = 2**20  # an integer among the arguments of a model
MAX_INPUT = 2**23  # values of an image
MAX_LABELS = 2**16  # transformers makes two dicts of them
# An expression may compute this many times the values that it reads and gives; all expressions
# together this many times the values of the model.
PER_WEIGHT, PER_PLAN = 16, 128
# Multiplications, as multiples of n ** 1.5 for n values: the cost of a product of square matrices.
PRODUCTS_PER_WEIGHT, PRODUCTS_PER_PLAN = 8, 4
_SMALL = 2**16  # values, or multiplications, that take no noticeable time

# Arguments by which model libraries fetch weights or settings from elsewhere. Each provider in
# sources refuses or drops more of them, those of its library.
_FETCHING = frozenset(
    {"cache_dir", "checkpoint_path", "custom_load", "pretrained_cfg_overlay", "weights_backbone"}
)


def check_plan(plan: Plan) -> None:
    """Refuse a plan that is too large, computes too much, or has inconsistent group metadata.

    Raises:
        PlanError: it does.
    """
    for what, count in (
        ("weights", len(plan.weights)), ("groups", len(plan.groups)),
        ("aliases", len(plan.aliases)),
    ):  # fmt: skip
        if count > MAX_WEIGHTS:
            raise _bad(f"it has {count:,} {what}, more than {MAX_WEIGHTS:,}", "plan-too-large")
    if not plan.original:
        raise _bad("it describes a model without parameters", "plan-without-parameters")
    factors = plan.factors.keys()
    if taken := sorted(factors & (plan.weights.keys() | plan.aliases.keys())):
        raise _bad(
            f"{taken[0]} is the name of a factor and of a tensor of the model", "name-not-unique"
        )
    _check_eval_cost(plan)
    _check_groups(plan)


def _check_eval_cost(plan: Plan) -> None:
    all_values = all_products = 0
    whole = plan.original + plan.stored + _SMALL
    for name, expr in plan.weights.items():
        values, products = eval_flops(expr)
        size = math.prod(expr.shape) + sum(map(math.prod, expr.refs.values())) + _SMALL
        if values > PER_WEIGHT * size or products > PRODUCTS_PER_WEIGHT * size**1.5:
            raise _bad(
                f"the expression of {name} computes {values:,} values by {products:,} "
                f"multiplications to give {math.prod(expr.shape):,}",
                "plan-too-expensive",
            )
        # What is read counts too: many small weights may each read one large factor.
        all_values += values + size - _SMALL
        all_products += products
    if all_values > PER_PLAN * whole or all_products > PRODUCTS_PER_PLAN * whole**1.5:
        raise _bad(
            f"its expressions compute {all_values:,} values by {all_products:,} multiplications "
            f"for a model of {plan.original:,}",
            "plan-too-expensive",
        )


def _check_groups(plan: Plan) -> None:
    factors, names = plan.factors, set[str]()
    taken = set[tuple[str, int, int]]()
    for group in plan.groups:
        if group.name in names:
            raise _bad(f"two groups have the name {group.name}", "name-not-unique")
        names.add(group.name)
        slots = {(m.slot.tensor, m.slot.start, m.slot.stop) for m in group.members}
        if not slots or len(slots) < len(group.members) or slots & taken:
            raise _bad(
                f"the group {group.name} has no members, or members of another group",
                "group-inconsistent",
            )
        taken |= slots
        if any(_shape_of(plan, m.slot.tensor) != m.slot.shape for m in group.members):
            raise _bad(
                f"the group {group.name} has a member that no expression gives",
                "group-inconsistent",
            )
        for factor, shape in group.factors.items():
            name = group.stored_name(factor)
            found = factors.get(name) or quantised_shape(plan, name)
            if len(shape) != 2 or found != shape:
                raise _bad(
                    f"the group {group.name} has a factor {factor} that nothing reads",
                    "group-inconsistent",
                )
        if not _is_small(group):
            raise _bad(f"the group {group.name} has an impossible fit error", "group-inconsistent")


def _shape_of(plan: Plan, name: str) -> tuple[int, ...] | None:
    expr = plan.weights.get(name)
    return None if expr is None else expr.shape


def _is_small(group: Group) -> bool:
    return group.error is None or 0 <= group.error <= MAX_ERROR


def checked_history(history: Sequence[Any]) -> tuple[Mapping[str, Any], ...]:
    """A history that can be printed: of the right types, its control characters escaped.

    Raises:
        ValueError: it is too long, or malformed.
    """
    if len(history) > MAX_ENTRIES:
        raise ValueError(f"its history has more than {MAX_ENTRIES:,} entries")
    if not all(isinstance(e, dict) and _is_entry(e) for e in history):
        raise ValueError("its history is malformed")
    return tuple(printable(entry) for entry in history)


def _is_entry(entry: Mapping[str, Any]) -> bool:
    figures = ("top1", "top5", "agreement", "ap", "ap50")
    whens = ("", "_before", "_teacher")
    if not all(_is_fraction(entry.get(key + when)) for key in figures for when in whens):
        return False
    match entry.get("step", ""):
        case "finetune":
            counts = ("train_images", "val_images", "steps")
            return all(type(entry.get(key)) is int for key in counts)
        case "convert":
            recipe = entry.get("recipe") or {"rules": []}
            rules = recipe.get("rules") if isinstance(recipe, dict) else None
            seen = entry.get("calibration") or {"images": 0}
            counted = isinstance(seen, dict) and type(seen.get("images")) is int
            return counted and isinstance(rules, list) and all(isinstance(r, dict) for r in rules)
        case str():
            return True
    return False


def _is_fraction(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and type(value) is not bool
                             and 0 <= value <= 1)  # fmt: skip


def checked_source(source: Any) -> Mapping[str, Any] | None:
    """A source that can be printed, and that names nothing to be fetched.

    `Source.from_json` checks the rest before a model is built.

    Raises:
        ValueError: a part has the wrong type, or would make a library read a file or the network.
    """
    if source is None:
        return None
    if not isinstance(source, dict):
        raise ValueError("its source is malformed")
    versions = source.get("versions", {})
    if len(json.dumps({**source, "config": None})) > MAX_SOURCE:
        raise ValueError("its source is longer than any model needs")
    if not isinstance(source.get("spec", ""), str) or not isinstance(versions, dict):
        raise ValueError("its source is malformed")
    if not all(isinstance(v, str) for v in versions.values()):
        raise ValueError("its source has versions that are not text")
    match source.get("preprocess"):
        case {"size": int(side), "mean": [*mean]} if side**2 * len(mean) > MAX_INPUT:
            raise ValueError(f"its source asks for images of {side:,} pixels per side")
    arguments = {key: source.get(key) for key in ("kwargs", "config")}
    _check_arguments(arguments)
    shown = {key: value for key, value in source.items() if key not in arguments}
    return {**printable(shown), **{k: v for k, v in arguments.items() if k in source}}


def _check_arguments(arguments: Any) -> None:
    """Refuse arguments by which a model would be fetched from elsewhere, or be huge."""
    items: list[tuple[Any, Any]] = [("", arguments)]
    while items:
        key, value = items.pop()
        if key in _FETCHING and value not in (None, False):
            raise ValueError(f"its source sets {key}, which would fetch files")
        if isinstance(value, dict):
            items += value.items()
        elif isinstance(value, list):
            items += [(key, item) for item in value]
        elif isinstance(value, str) and (
            value.startswith(("local-dir:", "hf-hub:", "hf_hub:"))
            or (key == "backbone" and not value.replace(".", "_").replace("-", "_").isidentifier())
        ):
            raise ValueError(f"its source names {value[:80]!r}, which would be fetched")
        elif isinstance(value, int) and abs(value) > (
            MAX_LABELS if key == "num_labels" else MAX_ARGUMENT
        ):
            raise ValueError(f"its source asks for a model with {key[:80]!r} of {value:,}")


def printable(value: Any) -> Any:
    """Data that is safe to print on a terminal: unprintable characters become escapes.

    Raises:
        ValueError: a text is too long to be printed.
    """
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    if not isinstance(value, str):
        return value
    if len(value) > MAX_TEXT:
        raise ValueError("it holds a text that is too long to be printed")
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def _bad(what: str, code: str) -> PlanError:
    return PlanError(
        f"The plan is malformed: {what}",
        "The model can't be rebuilt from it",
        "If it came from a file, the file is damaged or forged: convert the model again",
        code=code,
    )
