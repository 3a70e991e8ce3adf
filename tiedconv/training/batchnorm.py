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
from tiedconv.training.distributed import ALONE, DistContext, PaddingImage


def has_batchnorm(model: nn.Module) -> bool:
    """Whether a model has batch norms that keep statistics."""
    return bool(norms_of(model))


def recalibrate_batchnorm(
    model: nn.Module,
    batches: Iterable[Batch],
    placement: Placement,
    processes: DistContext = ALONE,
) -> int:
    """Replaces the statistics of all batch norms by their plain average over `batches`.

    Only the batch norms are in training mode meanwhile; dropout stays off and no weight changes.
    All modules get their mode back. Of several processes each gives its part of the batches,
    and all get the average.

    Returns:
        The number of batches used; 0 leaves the statistics as they were.
    """
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    used = 0
    spare = PaddingImage(processes)
    with modes_kept(model), torch.no_grad():
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = None  # torch's word for a cumulative average
        try:
            for batch in batches:
                images = spare.instead_of_none(batch.images)
                if images is None or len(images) < 2:  # one image has no variance
                    if images is None or not processes.several:
                        continue
                    images = images.expand(2, -1, -1, -1)
                if not used:
                    for norm in norms:
                        norm.reset_running_stats()
                used += 1
                with placement.autocast():
                    model(placement.images(images))
            for norm in norms if used else ():
                for statistic in (norm.running_mean, norm.running_var):
                    if statistic is not None and processes.several:
                        processes.sum(statistic).div_(processes.count)
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


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    ]
