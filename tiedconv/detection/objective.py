"""What a detector in training minimises: its own loss, and the distance to a teacher's answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.data import Objects
from tiedconv.detection.classes import class_map
from tiedconv.detection.outputs import (
    corners,
    generalised_iou,
    label_count,
    parts_of,
    probabilities,
)
from tiedconv.errors import MissingExtra, UserError
from tiedconv.training.batchnorm import norms_of
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.losses import feature_loss
from tiedconv.training.objective import Outcome, check_teacher, common_blocks, outputs_of

L1, GIOU = 5.0, 2.0
"""Weights of the parts of the distance between boxes, as in DETR (arXiv 2005.12872)."""


class DetectionObjective:
    """The loss of a detector on a batch, made once for a training.

    Norms with running statistics stay as they are: batches of a detector are too small for them.

    Args:
        config: the options; `distill_weight` is the teacher's share, and from 1 on labels are not
            looked at. Any `augment` but "none" mirrors half of the images.
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
        check_teacher(config, teacher)
        by_features = config.features > 0 and teacher is not None
        self._blocks = common_blocks(student, teacher) if by_features and teacher else ()

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
        more = {"labels": self._labels(labels, mirrored)} if share < 1 else {}
        with outputs_of(self._student, self._blocks) as own, self._placement.autocast():
            output = self._forward(shown, **more)
        logits, _ = parts_of(output)
        loss = torch.zeros((), device=logits.device)
        if share < 1:
            loss = loss + (1 - share) * _own_loss(output)
        if self._teacher is not None and (share > 0 or self._blocks):
            with (
                torch.no_grad(),
                outputs_of(self._teacher, self._blocks) as aims,
                self._placement.autocast(),
            ):
                answer = self._teacher(shown)
            if share > 0:
                loss = loss + share * answer_loss(output, answer, self._student)
            if self._blocks:
                loss = loss + self.config.features * feature_loss(own, aims)
        return Outcome(loss, logits)

    def _mirrored(self, count: int, seed: int) -> Tensor:
        if self.config.augment == "none":
            return torch.zeros(count, dtype=torch.bool)
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5

    def _labels(self, images: Tensor, mirrored: Tensor) -> list[dict[str, Tensor]]:
        if self._classes is None:
            count = label_count(self._student, len(self._objects.names))
            classes = class_map(self._student, self._objects, count)
            self._classes = torch.tensor(classes, dtype=torch.int64)
        found = some_labels(self._objects, images, self._classes)
        for labels, mirror in zip(found, mirrored.tolist(), strict=True):
            if mirror:
                labels["boxes"][:, 0] = 1 - labels["boxes"][:, 0]
        device = self._placement.device
        return [{name: t.to(device) for name, t in labels.items()} for labels in found]


def some_labels(objects: Objects, images: Tensor, classes: Tensor) -> list[dict[str, Tensor]]:
    """What stands in some images, as detectors of transformers want it; crowds are left out.

    Args:
        objects: of the data.
        images: their numbers, shape (B,).
        classes: the model's class for each class of the data.

    Returns:
        for each image `class_labels` (n,) and `boxes` (n, 4): centre and size, as shares.
    """
    found: list[dict[str, Tensor]] = []
    for image in images.tolist():
        where = objects.of(image)
        single = objects.crowds[where] == 0
        boxes = torch.tensor(objects.boxes[where][single], dtype=torch.float32)
        size = torch.tensor(objects.sizes[image], dtype=torch.float32).repeat(2)
        boxes = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1) / size
        kinds = torch.tensor(objects.classes[where][single], dtype=torch.int64)
        found.append({"class_labels": classes[kinds], "boxes": boxes})
    return found


def answer_loss(output: Any, answer: Any, model: nn.Module) -> Tensor:
    """How far a detector's answer is from a teacher's.

    Each query of the teacher is matched with one of the student by the Hungarian method, as
    queries that are chosen from the image may come in another order. Classes by cross-entropy
    with the teacher's probabilities, boxes by L1 and GIoU, weighted by the teacher's confidence;
    all divided by the sum of that, about the number of objects that the teacher sees.

    Args:
        output: of the student.
        answer: of the teacher.
        model: the student.

    Raises:
        UserError: other queries or classes.
        MissingExtra: SciPy is not installed.
    """
    (logits, boxes), (taught, aims) = parts_of(output), parts_of(answer)
    if logits.shape != taught.shape:
        raise UserError(
            f"The teacher gives logits {tuple(taught.shape)} and the model {tuple(logits.shape)}",
            "The one can't teach the other",
            "Choose a teacher with the same queries and classes, such as --teacher auto",
        )
    labels = label_count(model, logits.shape[-1])
    wanted = probabilities(taught, labels)
    places = _matched(probabilities(logits, labels), boxes, wanted, aims)
    logits = logits.gather(1, places[..., None].expand_as(logits))
    boxes = boxes.gather(1, places[..., None].expand_as(boxes))
    weight = wanted.max(dim=-1).values
    if logits.shape[-1] == labels + 1:
        classes = F.cross_entropy(logits.flatten(0, 1), taught.flatten(0, 1).softmax(-1))
        classes = classes * weight.numel()
    else:
        classes = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    apart = L1 * (boxes - aims).abs().sum(-1)
    apart = apart + GIOU * (1 - generalised_iou(corners(boxes), corners(aims)))
    total: Tensor = (classes + (weight * apart).sum()) / weight.sum().clamp(min=1.0)
    return total


@torch.no_grad()
def _matched(found: Tensor, boxes: Tensor, wanted: Tensor, aims: Tensor) -> Tensor:
    """For each query of the teacher, the student's that stands for it, (B, Q)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtra.of("scipy", "detection", "Teaching a detector") from error
    costs = L1 * torch.cdist(aims, boxes, p=1) + torch.cdist(wanted, found)
    rows = [linear_sum_assignment(cost)[1] for cost in costs.double().cpu().numpy()]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(boxes.device)


def _own_loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError(
            f"The model was given labels and returns {type(output).__name__} without a loss",
            "It can't be trained with labels",
            "Use --distill 1 with a teacher, or a model that returns a loss",
        )
    return loss.float()
