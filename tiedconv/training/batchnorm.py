"""Batch norm statistics, estimated anew.

Changed weights change what reaches a batch norm, and running averages lag behind. So before an
evaluation mean and variance are measured over some training batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tiedconv.data import Batch
from tiedconv.training.device import Placement


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a model has batch norms that keep statistics."""
    return bool(_batchnorms(model))


def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Batch], placement: Placement) -> int:
    """Replaces the statistics of all batch norms by their plain average over `batches`.

    Only the batch norms are in training mode meanwhile; dropout stays off and no weight changes.
    All modules get their mode back.

    Returns:
        The number of batches used; 0 leaves the statistics as they were.
    """
    norms = _batchnorms(model)
    momenta = [norm.momentum for norm in norms]
    used = 0
    with modes_kept(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # torch's word for a cumulative average
        try:
            for batch in batches:
                if len(batch.images) < 2:  # one image has no variance
                    continue
                if not used:
                    for norm in norms:
                        norm.reset_running_stats()
                used += 1
                with placement.autocast():
                    model(placement.images(batch.images))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return used


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Puts each module back into training or evaluation mode, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _batchnorms(model: nn.Module) -> list[_BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
