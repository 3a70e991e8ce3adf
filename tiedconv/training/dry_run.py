"""What a training will be and take, before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.training.batching import with_batch_size
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import seeds_apart
from tiedconv.training.distributed import init_distributed
from tiedconv.training.optim import trained_only
from tiedconv.training.throughput import Throughput, measure_throughput, require_time
from tiedconv.training.trainer import TrainerSetup


@dataclass(frozen=True)
class Forecast:
    """What a training will be and take.

    Attributes:
        steps: optimiser steps in all.
        epochs: the last may be partial.
        warmup: steps of these in which the learning rate rises.
        batch_size: images in a step.
        images: in the training set.
        val_images: in the validation set.
        trained: numbers that are trained.
        pace: the throughput, measured in a few steps.
        seconds: that all steps and evaluations take at this throughput.
        processes: that share the work.
        device: its name.
        not_compiled: why the model can't be compiled; None if it is, or if nobody asked.
    """

    steps: int
    epochs: int
    warmup: int
    batch_size: int
    images: int
    val_images: int
    trained: int
    pace: Throughput
    seconds: float
    processes: int
    device: str
    not_compiled: str | None


def forecast(
    model: nn.Module,
    train_data: Dataset[Any],
    val_data: Dataset[Any],
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    device: str | torch.device = "auto",
) -> Forecast:
    """Measures a few steps of a training and part of an evaluation; the model stays as it is.

    Arguments and errors are those of `train`.
    """
    config = config or TrainConfig()
    with (
        init_distributed(device) as (processes, place),
        seeds_apart(place),
        trained_only(model, config.only),
    ):
        config = with_batch_size(model, train_data, val_data, config, teacher=teacher, device=place)
        setup = TrainerSetup(model, train_data, val_data, config, teacher, place, processes)
        with setup.opened():
            setup.dry_step()
            reason = setup.compile()
            return _forecast(setup, reason)


def _look_seconds(setup: TrainerSetup) -> float:
    if not setup.config.keep_best:
        return 0.0
    setup.held_out.measure()
    return setup.held_out.seconds


def _forecast(setup: TrainerSetup, reason: str | None) -> Forecast:
    config, per_epoch = setup.config, len(setup.loader)
    evaluator = setup.evaluator
    scored = evaluator.estimated_seconds()
    throughput = measure_throughput(
        setup.updater, setup.loader, scored, evaluator.norm_seconds(scored), _look_seconds(setup)
    )
    # The teacher sees the validation images once: to be scored, or to label them.
    taught = 0.0 if setup.teacher is None else evaluator.estimated_seconds(setup.teacher)
    steps = config.total_steps(per_epoch)
    if config.time_budget is not None:
        left = config.time_budget - throughput.eval_seconds - taught
        steps = setup.processes.broadcast_int(throughput.steps_within(left, per_epoch, config))
        require_time(steps, config.time_budget, throughput)
    looks = len(setup.steps_to_look_at(steps))
    device = setup.placement.device
    return Forecast(
        steps=steps,
        epochs=-(-steps // per_epoch),
        warmup=round(config.warmup * steps),
        batch_size=config.batch_size,
        images=setup.loader.images,
        val_images=setup.val_loader.images,
        trained=sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        pace=throughput,
        seconds=taught + throughput.seconds_of(steps, per_epoch, config, looks),
        processes=setup.processes.count,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        not_compiled=reason,
    )
