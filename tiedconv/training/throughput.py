"""Time and memory of training steps, measured by a few steps that are rolled back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tiedconv.data import Batch, Loader
from tiedconv.errors import UserError
from tiedconv.runtime.tensors import state_tensors
from tiedconv.training.best_state import CHECKS
from tiedconv.training.config import TrainConfig
from tiedconv.training.evaluation import require_some
from tiedconv.training.train_step import TrainStep
from tiedconv.utils.memory import peak_rss

PROBE_EPOCH = -2
"""The "epoch" whose images are used for steps that are rolled back."""

_WARM_UP = 2  # steps in which memory is first allocated and kernels are chosen
_STEPS = 8
_SECONDS = 30.0
_MARGIN = 0.97  # of a time budget: the rest is for writing the result


@dataclass(frozen=True)
class Throughput:
    """Measured time and memory of a training.

    Attributes:
        step_seconds: of one step, with the reading of its images.
        images_per_second: in training, over all processes.
        eval_seconds: of one evaluation.
        memory: the most bytes that a device, or on the CPU the process, has held.
        norm_seconds: of estimating batch norm statistics, before each evaluation but the first.
        look_seconds: of one measurement of the held-out loss.
    """

    step_seconds: float
    images_per_second: float
    eval_seconds: float
    memory: int
    norm_seconds: float = 0.0
    look_seconds: float = 0.0

    @property
    def _between(self) -> float:
        """What comes with each evaluation but the first."""
        looks = 2 if self.norm_seconds else 1
        return self.eval_seconds + self.norm_seconds + looks * self.look_seconds

    def steps_within(self, seconds: float, per_epoch: int, config: TrainConfig) -> int:
        """How many steps fit into a time, with the evaluations that come between them.

        Args:
            seconds: that are left.
            per_epoch: steps in an epoch.
            config: whether each epoch ends with an evaluation.

        Returns:
            0 or less where there is no time for any.
        """
        scored = self._between
        left = _MARGIN * seconds - scored - CHECKS * self.look_seconds  # one at the end at least
        each = scored / per_epoch if config.eval_every_epoch else 0.0
        return int(left / (self.step_seconds + each))

    def seconds_of(self, steps: int, per_epoch: int, config: TrainConfig, looks: int = 0) -> float:
        """How long a run takes, with an evaluation before and after it.

        Args:
            steps, per_epoch, config: of the run.
            looks: at the held-out loss on the way.
        """
        between = max(0, -(-steps // per_epoch) - 1) if config.eval_every_epoch else 0
        train = steps * self.step_seconds + self.eval_seconds
        train += (looks + 1) * self.look_seconds if self.look_seconds else 0.0
        return train + (1 + between) * self._between


def measure_throughput(
    updater: TrainStep,
    loader: Loader,
    eval_seconds: float,
    norm_seconds: float = 0.0,
    look_seconds: float = 0.0,
) -> Throughput:
    """Takes a few steps, and leaves model and optimiser as they were.

    Args:
        updater: takes the steps; its optimiser has taken none yet.
        loader: of the training images.
        eval_seconds: of one evaluation, measured before.
        norm_seconds: of estimating batch norm statistics.
        look_seconds: of one measurement of the held-out loss.
    """
    device = updater.placement.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with rolled_back(updater):
        start = started = time.perf_counter()
        steps = images = 0
        for i, batch in enumerate(itertools.islice(warmup_batches(loader), _WARM_UP + _STEPS)):
            # Read back, as the loop does now and then: it waits for the device.
            float(updater.step(batch.images, batch.labels, updater.config.peak_lr, i, 1.0))
            steps, images = steps + 1, images + len(batch.images)
            if time.perf_counter() - started > _SECONDS:
                break
            if i < _WARM_UP:
                start, steps, images = time.perf_counter(), 0, 0
        passed = time.perf_counter() - start
    speed = images * updater.processes.count / max(passed, 1e-9)
    return Throughput(
        passed / steps, speed, eval_seconds, peak_memory(device), norm_seconds, look_seconds
    )


def require_time(steps: int, seconds: float, throughput: Throughput) -> int:
    """The steps that a time budget has room for.

    Raises:
        UserError: none.
    """
    if steps < 1:
        scored = throughput.eval_seconds + throughput.norm_seconds + throughput.look_seconds
        raise UserError(
            f"The time budget of {seconds:g} s is too short for a training",
            f"An evaluation takes about {scored:.1f} s, a step {throughput.step_seconds:.2f} s",
            "Give it more time, or fewer validation images (--limit, --val-split)",
            code="time-budget-too-small",
        )
    return steps


def warmup_batches(loader: Loader) -> Iterator[Batch]:
    """Batches that have images, epoch after epoch, for steps that are rolled back.

    Raises:
        DataError: no image at all can be read.
    """
    some = True
    while some:
        some = False
        for batch in loader.epoch(PROBE_EPOCH):
            if len(batch.images):
                some = True
                yield batch
    require_some(0, batch.broken)


@contextmanager
def rolled_back(updater: TrainStep) -> Iterator[None]:
    """A context after which model and optimiser are what they were before."""
    model, optimizer = updater.learner.model, updater.optimizer
    before = {n: t.detach().clone() for n, t in state_tensors(model).items()}
    scale = updater.scaler.state_dict()
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, tensor in state_tensors(model).items():
                tensor.copy_(before[name])
        optimizer.state.clear()
        updater.scaler.load_state_dict(scale)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this device has held so far, or on the CPU the process; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_rss() or 0
