"""Evaluations of the model in training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import nn

from tiedconv.data import Loader
from tiedconv.training.batchnorm import (
    has_batchnorm,
    modes_kept,
    norms_of,
    recalibrate_batchnorm,
)
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.distributed import DistContext
from tiedconv.training.evaluation import EvalResult, Scorer
from tiedconv.training.events import OnEvent
from tiedconv.training.objective import first_tensor
from tiedconv.training.wrappers import TrainWrapper

RECALIBRATION_EPOCH = -1
"""The "epoch" whose order and augmentation are used to estimate batch norm statistics."""

_SECONDS = 5.0  # of an evaluation, to estimate the whole


class Evaluator:
    """Evaluates a model, as it is or with batch norm statistics of its own.

    Args:
        learner: the model.
        loader: of the training images, for the statistics.
        val_loader: of the images to evaluate on.
        scorer: what evaluates.
        config: the options.
        placement: where and how to compute.
        processes: that evaluate together.
    """

    def __init__(
        self,
        learner: TrainWrapper,
        loader: Loader,
        val_loader: Loader,
        scorer: Scorer,
        config: TrainConfig,
        placement: Placement,
        processes: DistContext,
    ) -> None:
        self.learner, self.loader, self.val_loader = learner, loader, val_loader
        self.scorer, self.placement, self.processes = scorer, placement, processes
        self.every_epoch = config.eval_every_epoch
        norms = has_batchnorm(learner.model)
        self.batches = config.bn_recalibrate if norms else 0
        self.seconds = 0.0  # that the last evaluation took

    def evaluate(self, emit: OnEvent, other: nn.Module | None = None) -> EvalResult:
        """The figures of the model as it is now, or of another one."""
        model = self.learner.model if other is None else other
        result = self.scorer(model, self.val_loader, self.placement, emit, self.processes)
        if other is None:
            self.learner.after_evaluation()
            self.seconds = result.seconds
        return result

    def estimated_seconds(self, other: nn.Module | None = None) -> float:
        """How long an evaluation takes, of the model or of another one, from its first images."""
        model, images = self.learner.model if other is None else other, 0
        start = time.perf_counter()
        with modes_kept(model), torch.no_grad():
            model.eval()
            for batch in self.val_loader.epoch():
                if len(batch.images):
                    with self.placement.autocast():
                        found = first_tensor(model(self.placement.images(batch.images)))
                    if found is not None:
                        float(found.sum())  # waits for the device
                    images += len(batch.images) * self.processes.count
                if time.perf_counter() - start > _SECONDS and not self.processes.several:
                    break
        if other is None:
            self.learner.after_evaluation()
        return (time.perf_counter() - start) * self.val_loader.images / max(1, images)

    def norm_seconds(self, eval_seconds: float) -> float:
        """How long `recalibrate` takes, by how long an evaluation of all images does."""
        batches = min(self.batches, len(self.loader))
        images = sum(map(self.loader.size, range(batches)))
        return eval_seconds * images / max(1, self.val_loader.images)

    def seconds_left(self, steps: int, look: float = 0.0) -> float:
        """How long the evaluations take that come with the last so many steps.

        Args:
            steps: that are left.
            look: seconds of one look at the held-out loss, taken before each evaluation.
        """
        epochs = -(-steps // len(self.loader))
        count = epochs if self.every_epoch else min(1, epochs)
        looks = look * (2 if self.batches else 1)
        return count * (self.seconds + self.norm_seconds(self.seconds) + looks)

    def recalibrate_if(self, measure: Callable[[], float]) -> float:
        """Re-estimate BatchNorm statistics, and keep them only if that lowers a loss.

        Args:
            measure: the loss of the model as it is now.

        Returns:
            the loss of the model as it is left.
        """
        before = measure()
        if not self.batches:
            return before
        norms = norms_of(self.learner.model)
        kept = [(t, t.clone()) for norm in norms for t in norm.buffers()]
        self.recalibrate()
        after = measure()
        if after < before:
            return after
        for tensor, value in kept:
            tensor.copy_(value)
        return before

    def recalibrate(self) -> None:
        """Re-estimates BatchNorm statistics, if there are any and it is asked for."""
        if self.batches:
            batches = itertools.islice(self.loader.epoch(RECALIBRATION_EPOCH), self.batches)
            recalibrate_batchnorm(self.learner.model, batches, self.placement, self.processes)
