"""The input that a model is timed on: a batch of what its multiply-adds were counted on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tiedconv.runtime.example_inputs import Arguments


def length_of(arguments: Arguments) -> int:
    """Inputs that are in a batch: the first side of the first tensor."""
    sides = (x.shape[0] for x in tensors_of(arguments) if x.ndim)
    return next(sides, 1)


def batch_of(arguments: Arguments, count: int) -> Arguments:
    """So many times the first input, on the CPU; what is not a row for each input stays.

    Args:
        arguments: of a model.
        count: inputs at a time.
    """
    length = length_of(arguments)

    def rows(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = torch.zeros(x.shape, dtype=x.dtype) if x.is_meta else x.detach().cpu()
        if not x.ndim or x.shape[0] != length:
            return x
        return x[:1].expand(count, *x.shape[1:]).contiguous()

    found: Arguments = pytree.tree_map(rows, arguments)
    return found


def tensors_of(arguments: Arguments) -> list[Tensor]:
    """The tensors among arguments, in order."""
    return [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor)]
