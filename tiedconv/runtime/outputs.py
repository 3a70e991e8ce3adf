"""The tensors in what a model returns, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from tiedconv.errors import UserError

ONLY = "logits"
"""The name of a single tensor that a model returns without one."""


def named_outputs(output: Any) -> dict[str, Tensor]:
    """Every tensor in a model's output.

    Args:
        output: a tensor (named `logits`), a mapping or an object of transformers (by their keys),
            a tuple or list (`0`, `1`, ...), nested in any way (`hidden_states.0`). What is no
            tensor, such as a cache, is left out.

    Raises:
        UserError: there is no tensor in it (`no-tensors-returned`).
    """
    found = dict(_leaves(output, ""))
    if not found:
        raise UserError(
            f"The model returns {type(output).__name__}, in which no tensors are found",
            "There is nothing to compare or to export",
            "Use a model that returns tensors, or an object, dict or tuple of them",
            code="no-tensors-returned",
        )
    return found


def chosen(found: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The outputs of these names; all of them if there are none.

    Raises:
        UserError: the model has no output of a name (`unknown-output`).
    """
    if unknown := [name for name in names if name not in found]:
        raise UserError(
            f"The model has no output {unknown[0]}",
            hint=f"Its outputs are {', '.join(found)}",
            code="unknown-output",
        )
    return {name: found[name] for name in names or found}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or ONLY, value
        return
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        # The first of a plain tuple is what one without names would be.
        items = [(str(i), inner) for i, inner in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else key)


def floating_tensors(output: Any) -> list[Tensor]:
    """The floating tensors in what a module returns, in order."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "to_tuple") else output)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def is_within(before: Tensor, after: Tensor, part: float) -> bool:
    """Whether two tensors differ by at most so much of the first one's largest entry."""
    if before.shape != after.shape:
        return False
    if not before.numel():
        return True
    return float((after - before).abs().max()) <= part * float(before.abs().max())
