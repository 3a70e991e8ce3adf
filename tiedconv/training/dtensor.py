"""Tensors of which each process may have a part only."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor put together of all parts. All processes must call it."""
    sharded: Any = tensor
    full: Tensor = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def shard_like(tensor: Tensor, own: Tensor) -> Tensor:
    """This process's part of a whole tensor, where `own` is divided; else the tensor itself."""
    sharded: Any = own
    if not hasattr(own, "full_tensor") or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = sharded.device_mesh
    return distribute_tensor(tensor.to(own.device), mesh, sharded.placements)


def local_tensor(tensor: Tensor) -> Tensor:
    """The part that this process has, in the memory of the tensor; for what goes number by number.

    Not all of torch's operations know divided tensors.
    """
    sharded: Any = tensor
    part: Tensor = sharded.to_local() if hasattr(tensor, "to_local") else tensor
    return part
