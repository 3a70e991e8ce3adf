"""One update of the parameters."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from tiedconv.data.seeds import epoch_seed
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.evaluation import check_labels
from tiedconv.training.losses import logits_of, training_loss
from tiedconv.training.parallel import Learner
from tiedconv.training.processes import Processes


class Updater:
    """Takes steps: forward and backward pass, and the optimiser.

    Args:
        learner: the model.
        optimizer: of its parameters.
        teacher: gives the logits to be learned, or None.
        config: the options.
        placement: where and how to compute.
        classes: of the data, where it is known.
        processes: that take each step together.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        teacher: nn.Module | None,
        config: TrainConfig,
        placement: Placement,
        classes: int | None,
        processes: Processes,
    ) -> None:
        self.learner, self.optimizer, self.teacher = learner, optimizer, teacher
        self.config, self.placement, self.classes = config, placement, classes
        self.processes = processes
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Half precision has few bits for small gradients; bfloat16 and float32 need no scale.
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.scales)
        self._checked = False

    def step(self, images: Tensor, labels: Tensor, lr: float, step: int, weight: float) -> Tensor:
        """One update.

        Args:
            images: (B, C, H, W) as the loader gives them: of this process.
            labels: (B,).
            lr: the learning rate.
            step: number of the step, which with the seed decides what is random in it.
            weight: of this process's mean loss in the mean over the processes.

        Returns:
            the loss of this process times `weight`, still on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.seed(step)
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(self.config.accumulate, len(images))
        told = torch.zeros((), device=self.placement.device)
        for i, (some, their) in enumerate(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        ):
            share = weight * len(some) / len(images) if parts > 1 else weight
            last = i == parts - 1
            with nullcontext() if last else self.learner.accumulating():
                loss = self.loss(some, their)
                loss = loss * share if share != 1.0 else loss
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            told += loss.detach()
        return self.apply(told)

    def apply(self, told: Tensor) -> Tensor:
        """Let the optimiser use the gradients; returns the loss, not finite if a gradient isn't."""
        if self.config.clip > 0:
            self.scaler.unscale_(self.optimizer)
            norm = self.learner.clip(self.parameters, self.config.clip)
            if not self.placement.scales:  # a scaler tries scales that are too large, and skips
                # 0 times a norm that isn't finite is NaN: shows bad gradients at their own step.
                told = told + 0 * norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return told

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of some images."""
        placed = self.placement.images(images)
        wanted = labels.to(self.placement.device, non_blocking=True)
        with self.placement.autocast():
            logits = logits_of(self.learner.forward(placed))
        if not self._checked or labels.max() >= logits.shape[-1]:
            check_labels(labels, logits.shape[-1], self.classes)
            self._checked = True
        target: Tensor | None = None
        if self.teacher is not None and self.config.distill_weight > 0:
            with torch.no_grad(), self.placement.autocast():
                target = logits_of(self.teacher(placed))
        return training_loss(logits, wanted, target, self.config)

    def seed(self, step: int) -> None:
        """Make dropout depend on the step, not on the steps before it."""
        value = epoch_seed(epoch_seed(self.config.seed, step), self.processes.rank)
        torch.default_generator.manual_seed(value)
        if self.placement.device.type == "cuda":
            torch.cuda.manual_seed(value)
