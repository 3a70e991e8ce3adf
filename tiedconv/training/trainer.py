"""What a training works with: loaders, the model on its device, what updates and evaluates it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.data import Loader, first_readable
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.training.batchnorm import batch_norm_errors, modes_kept, norms_of
from tiedconv.training.best_state import check_steps
from tiedconv.training.compile import CompiledOrEager, compile_if_possible
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.distributed import DistContext, check_shares
from tiedconv.training.evaluation import class_count, scorer_of
from tiedconv.training.evaluator import Evaluator
from tiedconv.training.held_out import HeldOutLoss, Remembered
from tiedconv.training.losses import rows_of
from tiedconv.training.objective import Loss, Objective
from tiedconv.training.optim import make_optimizer
from tiedconv.training.throughput import warmup_batches
from tiedconv.training.train_step import TrainStep
from tiedconv.training.wrappers import make_learner

BATCHES = 4
"""By which it is found out whether batch norms should keep their statistics."""

HARM = 0.5
"""Distance that a batch's statistics may move the teacher's outputs, of that of the model's."""


class TrainerSetup:
    """The parts of a training, made for one model and these data.

    Arguments and errors are those of `train`, with a device and processes that are settled.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[Any],
        val_data: Dataset[Any],
        config: TrainConfig,
        teacher: nn.Module | None,
        device: torch.device,
        processes: DistContext,
    ) -> None:
        images = min(len(train_data), len(val_data))  # type: ignore[arg-type]
        check_shares(processes, config.batch_size, images)
        self.train_data, self.val_data = train_data, val_data
        self.other_classes = False  # of the teacher
        self.given, self.teacher, self.config, self.processes = model, teacher, config, processes
        size, seed, workers = config.batch_size, config.seed, config.workers
        part = processes.rank, processes.count
        self.loader = Loader(
            train_data, size, shuffle=True, seed=seed, workers=workers, device=device, part=part
        )
        self.val_loader = Loader(
            val_data, size, seed=seed, workers=workers, device=device, part=part
        )
        self.placement = Placement.choose(model, device, config.amp, config.channels_last)
        for each in (model, teacher):
            if each is not None:
                self.placement.place(each)
        if teacher is not None:
            teacher.eval()
        self.learner = make_learner(model, processes, device, config.sharding)
        self.model = self.learner.model
        self.forward = CompiledOrEager(self.learner.forward)
        objective = _objective(
            config, self.forward, self.model, teacher, train_data, self.placement
        )  # fmt: skip
        self.optimizer = make_optimizer(self.model, config)
        self.updater = TrainStep(
            self.learner, self.optimizer, objective, config, self.placement, processes
        )  # fmt: skip
        self.evaluator = Evaluator(
            self.learner, self.loader, self.val_loader, scorer_of(val_data), config,
            self.placement, processes,
        )  # fmt: skip

    @functools.cached_property
    def held_out(self) -> HeldOutLoss:
        """What measures the loss on held-out images; they are read when it is asked for."""
        teacher = None if self.teacher is None else Remembered(self.teacher)
        objective = _objective(
            _plain(self.config), self.model, self.model, teacher, self.val_data, self.placement
        )  # fmt: skip
        return HeldOutLoss(self.val_data, objective, self.learner, self.processes, teacher)

    def steps_to_look_at(self, steps: int) -> frozenset[int]:
        """After which of so many steps the held-out loss is measured, besides evaluations."""
        if not self.config.keep_best:
            return frozenset()
        images = len(self.held_out.images) * self.processes.count
        per_epoch = len(self.loader) if self.config.eval_every_epoch else None
        return check_steps(steps, self.config.batch_size, images, per_epoch)

    @torch.no_grad()
    def dry_step(self) -> None:
        """Shows two images to model and teacher, so that errors show before the work.

        Raises:
            UserError: images of a size that one of them can't take, or a teacher with other
                classes or widths, where it is to be learned from.
            DataError: labels that the model has no output for.
        """
        sample = first_readable(self.val_data)
        if sample is None or getattr(self.val_data, "task", None) is not None:
            return
        images, labels = torch.stack([sample[0]] * 2), torch.tensor([sample[1]] * 2)
        with modes_kept(self.model):
            self.model.eval()
            shown = self.placement.images(images)
            with self.placement.autocast():
                own = rows_of(checked_forward(self.learner.forward, shown))
                if self.teacher is not None:
                    other = rows_of(checked_forward(self.teacher, shown))
                    self.other_classes = own.shape[-1] != other.shape[-1]
            self.updater.objective(images, labels, 0)
        self.learner.after_evaluation()

    @torch.no_grad()
    def batch_statistics_harm(self) -> bool:
        """Whether the statistics of a batch do more to the outputs than the compact form does.

        A few training batches are shown to the teacher with the statistics of each batch; if its
        outputs move by more than half of the distance that the model has to go, such batches are
        too small to learn by. The models stay as they are. All processes must call it.
        """
        teacher = self.teacher
        norms = [] if teacher is None else norms_of(teacher)
        if teacher is None or not norms or not norms_of(self.model) or self.other_classes:
            return False
        config = replace(_plain(self.config), distill_weight=1.0)
        losses = torch.zeros(2)
        kept = [(t, t.clone()) for norm in norms for t in norm.buffers()]
        with modes_kept(self.model), modes_kept(teacher):
            self.model.eval()
            for batch in itertools.islice(warmup_batches(self.loader), BATCHES):
                remembered = Remembered(teacher)
                remembered(self.placement.images(batch.images))
                for i, shown in enumerate((self.model, teacher)):
                    for norm in norms:
                        norm.train(i == 1)
                    objective = _objective(
                        config, shown, shown, remembered, self.train_data, self.placement
                    )
                    with batch_norm_errors(len(batch.images)):
                        outcome = objective(batch.images, batch.labels, 0)
                    losses[i] += float(outcome.loss)
                teacher.eval()
        for tensor, value in kept:
            tensor.copy_(value)
        self.learner.after_evaluation()
        student, own = self.processes.sum(losses).tolist()
        return bool(own > HARM * student)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A context that ends with readers stopped, and modes and layouts as they were."""
        with modes_kept(self.given), closing(self.loader), closing(self.val_loader):
            try:
                yield
            finally:
                self.placement.release(self.given, self.teacher)

    def compile(self) -> str | None:
        """Lets torch compile the model if that was asked for; gives the reason if it can't."""
        if not self.config.compile:
            return None
        return compile_if_possible(self.forward, self.updater, self.loader)


def _plain(config: TrainConfig) -> TrainConfig:
    """The options without what makes the loss of a batch random or another than the aim's."""
    return replace(
        config, augment="none", mixup=0.0, cutmix=0.0, label_smoothing=0.0, features=0.0,
        temperature=1.0,
    )  # fmt: skip


def _objective(
    config: TrainConfig,
    forward: Callable[..., Any],
    student: nn.Module,
    teacher: nn.Module | None,
    data: Dataset[Any],
    placement: Placement,
) -> Loss:
    """What is minimised: as the data set's own task has it, or a classifier's loss."""
    task = getattr(data, "task", None)
    if task is not None:
        made: Loss = task.objective(config, forward, student, teacher, placement)
        return made
    return Objective(config, forward, student, teacher, class_count(data), placement)
