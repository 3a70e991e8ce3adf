"""One update of the parameters."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from tiedconv.data.seeds import step_seed
from tiedconv.training.batchnorm import batch_norm_errors
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.distributed import DistContext
from tiedconv.training.objective import Loss
from tiedconv.training.optim import set_learning_rate
from tiedconv.training.wrappers import TrainWrapper


class TrainStep:
    """Takes steps: forward and backward pass, and the optimiser.

    Args:
        learner: the model.
        optimizer: of its parameters.
        objective: gives the loss of a batch.
        config: the options.
        placement: where and how to compute.
        processes: that take each step together.
    """

    def __init__(
        self,
        learner: TrainWrapper,
        optimizer: torch.optim.Optimizer,
        objective: Loss,
        config: TrainConfig,
        placement: Placement,
        processes: DistContext,
    ) -> None:
        self.learner, self.optimizer, self.objective = learner, optimizer, objective
        self.config, self.placement, self.processes = config, placement, processes
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Half precision has few bits for small gradients; bfloat16 and float32 need no scale.
        self.scaler = torch.amp.GradScaler(placement.device.type, enabled=placement.scales)

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
        set_learning_rate(self.optimizer, lr)
        return self.apply(self.backward(images, labels, step, weight))

    def backward(
        self, images: Tensor, labels: Tensor, step: int, weight: float, exchange: bool = True
    ) -> Tensor:
        """The gradients of one update, and its loss; arguments as for `step`.

        With `exchange` false the processes keep their gradients to themselves, so that none waits
        for another.
        """
        seed = step_seed(self.config.seed, step, self.processes.rank)
        self.seed(seed)
        self.optimizer.zero_grad(set_to_none=True)
        parts = min(self.config.accumulate, len(images))
        total = torch.zeros((), device=self.placement.device)
        for i, (some, their) in enumerate(
            zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        ):
            fraction = weight * len(some) / len(images) if parts > 1 else weight
            last = i == parts - 1
            with nullcontext() if last and exchange else self.learner.accumulating():
                with batch_norm_errors(len(some)):
                    loss = self.objective(some, their, seed + i).loss
                loss = loss * fraction if fraction != 1.0 else loss
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def apply(self, loss: Tensor) -> Tensor:
        """The optimiser's step; returns the loss, not finite if a gradient isn't."""
        if self.config.clip > 0:
            self.scaler.unscale_(self.optimizer)
            norm = self.learner.clip(self.parameters, self.config.clip)
            if not self.placement.scales:  # a scaler tries scales that are too large, and skips
                # 0 times a norm that isn't finite is NaN: shows bad gradients at their own step.
                loss = loss + 0 * norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def seed(self, seed: int) -> None:
        """Make dropout depend on the step, not on the steps before it."""
        torch.default_generator.manual_seed(seed)
        if self.placement.device.type == "cuda":
            torch.cuda.manual_seed(seed)
