"""The training loss of a detector: its own loss, and the distillation of a teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.data import Objects
from tiedconv.detection.classes import class_map
from tiedconv.detection.losses import detection_distillation_loss
from tiedconv.detection.outputs import num_labels_from_config, parts_of, tensor_in
from tiedconv.errors import UserError
from tiedconv.training.batchnorm import norms_of
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.losses import feature_loss
from tiedconv.training.objective import Outcome, distilled_blocks, outputs_of


class DetectionObjective:
    """The loss of a detector on a batch, made once for a training.

    Norms with running statistics stay in evaluation mode: a detector's batches are too small.

    Args:
        config: the options; at `distill_weight` 1 labels are ignored. Any `augment` but "none"
            mirrors half of the images.
        forward: runs the model on images and, if it is given them, `labels`.
        student: the model itself, on its device.
        teacher: in evaluation mode and on the same device, or None.
        placement: where and in which layout and precision to compute.
        objects: of the data.

    Raises:
        UserError: features are asked for without a teacher, or of one with other blocks.
    """

    def __init__(
        self,
        config: TrainConfig,
        forward: Callable[..., Any],
        student: nn.Module,
        teacher: nn.Module | None,
        placement: Placement,
        objects: Objects,
    ) -> None:
        self.config, self._forward, self._student = config, forward, student
        self._teacher, self._placement, self._objects = teacher, placement, objects
        self._norms = norms_of(student)
        self._classes: Tensor | None = None
        self._checked = False
        self._blocks = distilled_blocks(config, student, teacher)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> Outcome:
        """The loss of a batch.

        Args:
            images: (B, C, H, W), on any device.
            labels: their numbers among the objects, (B,).
            seed: decides which images are mirrored.
        """
        shown = self._placement.images(images)
        mirrored = self._mirrored(len(images), seed)
        shown = torch.where(mirrored.to(shown.device)[:, None, None, None], shown.flip(-1), shown)
        for norm in self._norms:
            norm.eval()
        share = self.config.distill_weight if self._teacher is not None else 0.0
        known = self._labels(labels, mirrored) if share < 1 else None
        with outputs_of(self._student, self._blocks) as own, self._placement.autocast():
            output = self._answer(shown, known)
        logits, boxes = parts_of(output)
        if known is not None:
            self._check_classes(logits.shape[-1])
            total = logits.sum() + boxes.sum()
            if tensor_in(output, "loss") is None and not bool(torch.isfinite(total)):
                return Outcome(math.nan * total, logits)
        loss = torch.zeros((), device=logits.device)
        if share < 1:
            loss = loss + (1 - share) * _own_loss(output)
        return Outcome(loss + self._taught(shown, output, own, share), logits)

    def _taught(
        self, images: Tensor, output: Any, own: dict[str, Tensor], share: float
    ) -> Tensor | float:  # fmt: skip
        """The loss against the teacher."""
        if self._teacher is None or not (share > 0 or self._blocks):
            return 0.0
        with (
            torch.no_grad(),
            outputs_of(self._teacher, self._blocks) as aims,
            self._placement.autocast(),
        ):
            answer = self._teacher(images)
        loss: Tensor | float = 0.0
        if share > 0:
            loss = loss + share * detection_distillation_loss(output, answer, self._student)
        if self._blocks:
            loss = loss + self.config.features * feature_loss(own, aims)
        return loss

    def _answer(self, images: Tensor, labels: list[dict[str, Tensor]] | None) -> Any:
        if labels is None:
            return self._forward(images)
        try:
            return self._forward(images, labels=labels)
        except ValueError:
            # transformers' detectors match boxes with labels, which refuses what is no number:
            # without labels it is seen whether that was it, and the training ends as others do.
            output = self._forward(images)
            logits, boxes = parts_of(output)
            if bool(torch.isfinite(logits.sum() + boxes.sum())):
                raise
            return output

    def _check_classes(self, outputs: int) -> None:
        """Checks that the labels are the classes that the model is evaluated on."""
        if self._checked:
            return
        scored = class_map(self._student, self._objects, outputs)
        if self._classes is None or self._classes.tolist() != list(scored):
            raise UserError(
                f"The model has {outputs} outputs and no num_labels",
                "It would be trained on other classes than it is evaluated on",
                "Give the model num_labels",
                code="classes-unknown",
            )
        self._checked = True

    def _mirrored(self, count: int, seed: int) -> Tensor:
        if self.config.augment == "none":
            return torch.zeros(count, dtype=torch.bool)
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5

    def _labels(self, images: Tensor, mirrored: Tensor) -> list[dict[str, Tensor]]:
        if self._classes is None:
            count = num_labels_from_config(self._student)  # the data may lack some classes
            outputs = len(self._objects.names) if count is None else count
            classes = class_map(self._student, self._objects, outputs)
            self._classes = torch.tensor(classes, dtype=torch.int64)
        found = some_labels(self._objects, images, self._classes)
        for labels, mirror in zip(found, mirrored.tolist(), strict=True):
            if mirror:
                labels["boxes"][:, 0] = 1 - labels["boxes"][:, 0]
        device = self._placement.device
        return [{name: t.to(device) for name, t in labels.items()} for labels in found]


def some_labels(objects: Objects, images: Tensor, classes: Tensor) -> list[dict[str, Tensor]]:
    """The labels of some images, as detectors of transformers take them.

    Crowds are left out, and boxes outside of the image; the others are clipped to it.

    Args:
        objects: of the data.
        images: their numbers, shape (B,).
        classes: the model's class for each class of the data.

    Returns:
        for each image `class_labels` (n,) and `boxes` (n, 4): centre and size, as fractions.
    """
    found: list[dict[str, Tensor]] = []
    for image in images.tolist():
        where = objects.of(image)
        single = objects.iscrowd[where] == 0
        boxes = torch.tensor(objects.boxes[where][single], dtype=torch.float64)
        kinds = torch.tensor(objects.classes[where][single], dtype=torch.int64)
        size = torch.tensor(objects.sizes[image], dtype=torch.float64)
        first = (boxes[:, :2] / size).clamp(0, 1)
        last = ((boxes[:, :2] + boxes[:, 2:]) / size).clamp(0, 1)
        seen = (last > first).all(dim=1)
        shares = torch.cat([(first + last) / 2, last - first], dim=1)[seen].float()
        found.append({"class_labels": classes[kinds[seen]], "boxes": shares})
    return found


def _own_loss(output: Any) -> Tensor:
    loss = tensor_in(output, "loss")
    if loss is None:
        raise UserError(
            f"The model was given labels and returns {type(output).__name__} without a loss",
            "It can't be trained with labels",
            "Use --distill 1 with a teacher, or a model that returns a loss",
            code="no-loss-returned",
        )
    return loss.float()
