"""The default learning rate: found for the model and the data at hand.

A compact model near its original is easily thrown out of its minimum, and how easily depends on the
model: an EfficientNet bears a thirtieth of what a ViT does. So one gradient is computed, and the
held-out loss is measured after a step of several lengths along the direction that the optimiser
would take first (of Adam the sign of each entry, of SGD the clipped gradient). It is the range test
of Smith (arXiv 1506.01186) in one step instead of an epoch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiedconv.training.batchnorm import norms_of
from tiedconv.training.config import USUAL_LR
from tiedconv.training.optim import SCALE
from tiedconv.training.throughput import rolled_back, warmup_batches

if TYPE_CHECKING:
    from tiedconv.training.trainer import TrainerSetup

TRIED = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Fractions of the usual rate of the optimiser."""

MOMENTUM = 10
"""Steps that one gradient takes part in, with SGD's momentum of 0.9."""
SHARE = 1 / 20
"""Of the run's work, at most, where that is more than `LEAST` images at a time."""
LEAST = 16


def find_lr(
    setup: TrainerSetup, steps: int, *, norms_frozen: bool = False
) -> tuple[float, dict[float, float], float]:
    """A peak learning rate for a run of so many steps; the model stays as it is.

    All processes must call it.

    Args:
        setup: of the run.
        steps: of the run.
        norms_frozen: whether batch norms keep their statistics in training.

    Returns:
        the rate, the held-out loss after one step with each rate tried, and before.
    """
    count = images_for(steps, setup.config.batch_size, setup.teacher is not None)
    count = -(-count // setup.processes.count)
    updater, measure = setup.updater, setup.held_out.measure
    start = measure(count)
    found: dict[float, float] = {}
    with rolled_back(updater):
        batch = next(warmup_batches(setup.loader))
        if norms_frozen:
            for norm in norms_of(setup.model):
                norm.eval()
        buffers = [(buffer, buffer.clone()) for buffer in setup.model.buffers()]
        updater.backward(batch.images, batch.labels, 0, 1.0)
        for buffer, value in buffers:  # norms saw a batch
            buffer.copy_(value)
        directions = _first_steps(setup)
        usual = USUAL_LR[setup.config.optimizer]
        for lr in (usual * factor for factor in TRIED):
            with torch.no_grad():
                for parameter, before, direction in directions:
                    parameter.copy_(before - lr * direction)
            found[lr] = measure(count)
            if found[lr] > 4 * start:
                break  # larger ones are worse
    best = min(found, key=lambda lr: found[lr])
    return min(usual, best), found, start


def images_for(steps: int, batch_size: int, teacher: bool) -> int:
    """How many images a rate may be measured on, in a run of so many steps."""
    each = 2 if teacher else 1  # forward passes of an image
    passes = steps * batch_size * (3 + teacher)  # a backward pass is about two of them
    return max(LEAST, int(SHARE * passes / (each * (len(TRIED) + 1))))


def _first_steps(setup: TrainerSetup) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each parameter, its values, and its first step at a learning rate of 1."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    adam = setup.config.optimizer == "adamw"
    factor = 1.0
    if not adam:
        parameters = setup.updater.parameters
        norm = float(setup.learner.clip(parameters, math.inf)) / setup.updater.scaler.get_scale()
        most = setup.config.clip if setup.config.clip > 0 else math.inf
        factor = MOMENTUM * min(1.0, most / max(norm, 1e-12)) / setup.updater.scaler.get_scale()
    for group in setup.optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            gradient = parameter.grad.nan_to_num()
            step = (gradient.sign() if adam else factor * gradient) * group[SCALE]
            found.append((parameter, parameter.detach().clone(), step))
    return found
