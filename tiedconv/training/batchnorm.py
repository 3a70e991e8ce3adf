"""BatchNorm statistics, re-estimated.

Changed weights change the inputs of a batch norm, and its running averages lag behind. So before
an evaluation mean and variance are estimated from some batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tiedconv.data import Batch
from tiedconv.errors import UserError
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
    The modes of all modules are restored. Each process passes its part of the batches, and all
    get the average.

    Returns:
        The number of batches used; 0 leaves the statistics as they were.
    """
    norms = norms_of(model)
    usable = _usable(batches, processes)
    first = next(usable, None)
    if first is None:
        return 0
    used = 0
    with modes_kept(model), torch.no_grad():
        model.eval()
        with averaged_statistics(norms):
            for images in itertools.chain([first], usable):
                used += 1
                with placement.autocast():
                    model(placement.images(images))
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                if statistic is not None and processes.several:
                    processes.sum(statistic).div_(processes.count)
    return used


def _usable(batches: Iterable[Batch], processes: DistContext) -> Iterator[Tensor]:
    """The images of each batch; one image has no variance."""
    spare = PaddingImage(processes)
    for batch in batches:
        images = spare.instead_of_none(batch.images)
        if images is not None and (len(images) > 1 or processes.several):
            yield images if len(images) > 1 else images.expand(2, -1, -1, -1)


@contextmanager
def averaged_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """A context in which the statistics are replaced by the plain average over its forwards."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # in torch: a cumulative average
        with batch_statistics(norms):
            yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def batch_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """A context in which batch norms normalise by the statistics of the batch."""
    modes = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.training = True
        yield
    finally:
        for norm, training in zip(norms, modes, strict=True):
            norm.training = training


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """A context after which each module is in training or evaluation mode, as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def norms_of(*models: nn.Module) -> list[_BatchNorm]:
    """The batch norms that keep statistics, each once."""
    modules = dict.fromkeys(module for model in models for module in model.modules())
    return [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]


@contextmanager
def batch_norm_errors(images: int) -> Iterator[None]:
    """Within it, a batch too small for batch norm is an error of this package.

    Raises:
        UserError: a batch norm got one value for each channel, of which there is no variance.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"Batch norm can't train on {images} image{'s' * (images != 1)} at a time: a layer has "
            "one value for each channel, of which there is no variance",
            "Nothing was trained",
            "Use a larger --batch-size (or --image-size), or a smaller --accumulate",
            code="batch-too-small",
        ) from error
