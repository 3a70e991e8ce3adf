"""Values that can't be computed with: NaN, infinite, or immense."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tiedconv.errors import WeightsError
from tiedconv.runtime.tensors import state_tensors

IMMENSE = 1e15
"""Above it, squares of float32 numbers that are added up soon overflow."""


def unsound_values(tensor: Tensor, *, is_buffer: bool = False) -> Tensor | None:
    """Where a tensor's values can't be computed with; None if all can.

    Args:
        tensor: of any type; those of integers are sound.
        is_buffer: only NaN counts then, as masks are made of -inf or of the lowest number.

    Returns:
        Booleans of the tensor's shape.
    """
    if is_lazy(tensor) or tensor.is_meta or not tensor.numel():
        return None
    if tensor.is_complex():
        tensor = tensor.abs()
    if not tensor.is_floating_point():
        return None
    if tensor.itemsize < 4:  # float8 has no comparisons, and `IMMENSE` is infinite in float16
        tensor = tensor.float()
    lowest, highest = (float(end) for end in torch.aminmax(tensor.detach()))  # NaN if any is
    if lowest == lowest and (is_buffer or max(-lowest, highest) <= IMMENSE):
        return None
    return tensor.isnan() if is_buffer else ~(tensor.abs() <= IMMENSE)


def check_finite(model: nn.Module, non_finite: str = "refuse") -> None:
    """Refuse a model with weights that can't be computed with, or take 0 for them.

    Args:
        model: changed in place by `zero`.
        non_finite: `refuse` or `zero`.

    Raises:
        WeightsError: there are such values (`weights-not-finite`).
    """
    parameters = {id(p) for p in model.parameters()}
    found: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in state_tensors(model).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        where = unsound_values(tensor, is_buffer=id(tensor) not in parameters)
        if where is not None:
            found[name] = int(where.sum())
            if non_finite == "zero":
                with torch.no_grad():
                    tensor.masked_fill_(where, 0)
    if found and non_finite == "refuse":
        raise not_finite(found)


def checked(
    name: str, tensor: Tensor, *, is_buffer: bool = False, non_finite: str = "refuse"
) -> Tensor:
    """A tensor that was read, if it can be computed with; with `zero`, with 0 where it can't.

    Raises:
        WeightsError: it can't (`weights-not-finite`).
    """
    where = unsound_values(tensor, is_buffer=is_buffer)
    if where is None:
        return tensor
    if non_finite == "refuse":
        raise not_finite({name: int(where.sum())})
    return tensor.masked_fill(where, 0)


def not_finite(found: Mapping[str, int]) -> WeightsError:
    """The error for weights that can't be computed with.

    Args:
        found: names of tensors, each with the number of such values.
    """
    shown = [f"{name} ({count:,})" for name, count in list(found.items())[:3]]
    more = f" and {len(found) - 3} more tensors" if len(found) > 3 else ""
    return WeightsError(
        f"Weights are NaN, infinite or above {IMMENSE:g}: {', '.join(shown)}{more}",
        "Nothing that is computed from them would be right",
        "Check the training or the copy; to take 0 for these values, pass --non-finite zero",
        code="weights-not-finite",
    )
