"""Storing in the type of the original: what was half precision stays so in the file.

A model whose weights were published in float16 or bfloat16 is converted in float32. Written in
float32, half of its parameters would take as many bytes as all of them did. The last step of the
history that says `stored_as` decides; such a file is widened when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

HALVES: Mapping[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def half_type(tensors: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> str | None:
    """The half type in which all matrices and kernels are stored; None if they are in another.

    Args:
        tensors: dtypes and shapes of the original's tensors, as its file has them.
    """
    kinds = {dtype for dtype, shape in tensors if dtype.is_floating_point and len(shape) > 1}
    return next((name for name, half in HALVES.items() if kinds == {half}), None)


def stored_as(history: Iterable[Mapping[str, Any]]) -> torch.dtype | None:
    """The half type in which a file stores weights, None for that which they have in memory."""
    for step in reversed(list(history)):
        if "stored_as" in step:
            return HALVES.get(str(step["stored_as"]))
    return None


def narrowed(tensor: Tensor, half: torch.dtype | None, *, closely: bool = False) -> Tensor:
    """A tensor as it is stored: matrices in half precision, vectors where that loses nothing.

    What half precision can't hold, such as 1e5 in float16, is left as it is. With `closely`, of a
    file with integers, so is a matrix that has values below its range, and vectors that lose no
    more than its precision are narrowed too.
    """
    if half is None or tensor.dtype not in (torch.float32, torch.float64):
        return tensor
    small = tensor.to(half)
    exact = bool((small.to(tensor.dtype) == tensor).all())
    if exact:
        return small
    if closely:
        return small if _is_near(small.to(tensor.dtype), tensor) else tensor
    return small if tensor.ndim > 1 and bool(small.isfinite().all()) else tensor


def halved(tensor: Tensor) -> Tensor:
    """Floats as a file with integers holds them: those of float16, or as they are."""
    return narrowed(tensor, torch.float16, closely=True).to(tensor.dtype)


def _is_near(small: Tensor, tensor: Tensor) -> bool:
    near = (small - tensor).abs() <= 2.0**-10 * tensor.abs() + 2.0**-24
    return bool((near & small.isfinite()).all())
