"""Training losses, and a meter that reads them from the device in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tiedconv.errors import TrainingError, UserError
from tiedconv.training.config import TrainConfig
from tiedconv.training.distributed import ALONE, DistContext


def find_logits(output: Any) -> Tensor | None:
    """The logits (B, classes) in whatever a model returns; None where none are found.

    Known are a tensor, an object with `.logits` (transformers), a dict with "logits", and a
    tuple or list whose first entry is one of these.
    """
    if isinstance(output, Tensor):
        return output.float()
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    return None if logits is None else find_logits(logits)


def logits_of(output: Any) -> Tensor:
    """The logits that `find_logits` finds, as float32.

    Raises:
        UserError: there are none (`no-logits-returned`).
    """
    logits = find_logits(output)
    if logits is None:
        raise UserError(
            f"The model returns {type(output).__name__}, in which no logits are found",
            hint="Use a model that returns logits: a tensor, an object with .logits or a tuple",
            code="no-logits-returned",
        )
    return logits


def rows_of(output: Any) -> Tensor:
    """The logits of a classifier: one row for each image, (B, classes).

    Raises:
        UserError: there are none, or several for an image, as a detector gives them.
    """
    logits = logits_of(output)
    if logits.ndim != 2:
        raise UserError(
            f"The model returns logits {tuple(logits.shape)}, not one row for each image",
            "It can't be evaluated as a classifier",
            "Use a classifier; for a detector, give a folder in COCO's form; for other outputs "
            "distil alone, with --distill 1 and a teacher",
            code="not-a-classifier",
        )
    return logits


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of the softened outputs, mean over the batch.

    T^2 keeps the size of the gradient independent of T (Hinton et al., arXiv 1503.02531).

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes).
        temperature: T.

    Raises:
        UserError: student and teacher have different classes.
    """
    _same_classes(student, teacher)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return divergence * temperature**2


def hard_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher predicts (Touvron et al., arXiv 2012.12877).

    Args:
        student: logits (B, classes).
        teacher: logits (B, classes).

    Raises:
        UserError: student and teacher have different classes.
    """
    _same_classes(student, teacher)
    return F.cross_entropy(student, teacher.argmax(dim=-1))


def _same_classes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise UserError(
            f"The teacher has {teacher.shape[-1]} outputs and the model {student.shape[-1]}",
            "It can't be distilled",
            "Choose a teacher with the same classes, or --teacher none",
            code="teacher-mismatch",
        )


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Distance of the outputs of blocks to the teacher's, relative to the teacher's norm.

    `sum (s - t)^2 / sum t^2` for each block, mean over the blocks: blocks with large outputs
    count no more than others (after FitNets, Romero et al., arXiv 1412.6550).

    Args:
        student: block name to output, of any shape; computed in float32.
        teacher: the same names, the same shapes.

    Raises:
        UserError: a block whose outputs have different shapes.
    """
    losses: list[Tensor] = []
    for name, own in student.items():
        aim = teacher[name]
        if own.shape != aim.shape:
            raise UserError(
                f"Block {name} returns {tuple(own.shape)}, and that of the teacher "
                f"{tuple(aim.shape)}",
                "The features of the one can't be compared with those of the other",
                "Choose a teacher of the same widths, such as --teacher auto, or leave "
                "--features out",
                code="teacher-mismatch",
            )
        own, aim = own.float(), aim.float()
        losses.append((own - aim).square().sum() / aim.square().sum().clamp(min=1e-12))
    return torch.stack(losses).mean()


def training_loss(
    logits: Tensor, labels: Tensor, target: Tensor | None, config: TrainConfig
) -> Tensor:
    """Cross-entropy, mixed with distillation where `target` holds the teacher's logits.

    Args:
        logits: of the model, (B, classes).
        labels: classes (B,), or class probabilities (B, classes).
        target: logits of the teacher, (B, classes), or None.
        config: kind and weight of the distillation, label smoothing.

    Raises:
        UserError: student and teacher have different classes.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if target is None:
        return loss
    if config.distillation == "hard":
        distilled = hard_distillation_loss(logits, target)
    else:
        distilled = distillation_loss(logits, target, config.temperature)
    return (1 - config.distill_weight) * loss + config.distill_weight * distilled


def diverged(step: int, steps: int, lr: float, saved: str) -> TrainingError:
    """The error for a loss that is not finite; `saved` names the last checkpoint."""
    return TrainingError(
        f"The loss or its gradient became NaN or infinite in step {step} of {steps}",
        saved,
        f"Lower the learning rate (--lr, now {lr:g}) or lengthen the warm-up",
        code="loss-not-finite",
    )


class LossMeter:
    """Keeps the last few losses on the device and reads them together.

    Reading a number waits for the device, so it is done once in `size` steps, or in the first
    `due` of them.
    """

    def __init__(
        self, device: torch.device, size: int = 10, total: float = 0.0, count: int = 0
    ) -> None:
        self._window = torch.zeros(size, device=device)
        self._used = 0
        self.due = size
        self.total = total
        self.count = count

    @property
    def full(self) -> bool:
        """Whether `read` must come before the next `add`."""
        return self._used >= min(self.due, len(self._window))

    def add(self, loss: Tensor) -> None:
        """Notes the loss of one step."""
        self._window[self._used] = loss.detach()
        self._used += 1

    @property
    def unread(self) -> int:
        """How many losses the next `read` gives."""
        return self._used

    def read(self, processes: DistContext = ALONE) -> list[float]:
        """The losses since the last call, oldest first; means over the processes."""
        window = self._window[: self._used]
        if processes.several:
            window = processes.sum(window.clone()) / processes.count
        losses: list[float] = window.tolist()
        self._used = 0
        for loss in losses:  # one by one: the bits must not depend on how many come together
            self.total += loss
        self.count += len(losses)
        return losses

    def mean(self) -> float:
        """The mean of all losses read so far."""
        return self.total / max(1, self.count)
