"""Distances between the outputs of two detectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.detection.outputs import (
    corners,
    generalised_iou,
    has_no_object,
    label_count,
    parts_of,
    probabilities,
)
from tiedconv.errors import MissingExtra, UserError

L1, GIOU = 5.0, 2.0
"""Weights of the parts of the distance between boxes, as in DETR (arXiv 2005.12872)."""


def detection_distillation_loss(output: Any, answer: Any, model: nn.Module) -> Tensor:
    """Distillation loss of a detector.

    Each query of the teacher is matched with one of the student by the Hungarian method, as
    queries that are chosen from the image may come in another order. Classes are compared by
    KL(teacher || student), boxes by L1 and GIoU, weighted by the teacher's confidence; all
    divided by the sum of the confidences, about the number of objects that the teacher detects.
    It is 0 for the teacher's own output.

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
            "It can't be distilled",
            "Choose a teacher with the same queries and classes, such as --teacher auto",
            code="teacher-mismatch",
        )
    labels = label_count(model, logits.shape[-1])
    wanted = probabilities(taught, labels)
    places = _matched(probabilities(logits.detach(), labels), boxes, wanted, aims)
    logits = logits.gather(1, places[..., None].expand_as(logits))
    boxes = boxes.gather(1, places[..., None].expand_as(boxes))
    weight = wanted.max(dim=-1).values
    if has_no_object(logits, labels):
        known = taught.log_softmax(-1)
        classes = F.kl_div(logits.log_softmax(-1), known, reduction="sum", log_target=True)
    else:
        crossed = F.binary_cross_entropy_with_logits
        classes = crossed(logits, wanted, reduction="sum") - crossed(
            taught, wanted, reduction="sum"
        )
    box_distance = L1 * (boxes - aims).abs().sum(-1)
    box_distance = box_distance + GIOU * (1 - generalised_iou(corners(boxes), corners(aims)))
    total: Tensor = (classes + (weight * box_distance).sum()) / weight.sum().clamp(min=1.0)
    return total


@torch.no_grad()
def _matched(found: Tensor, boxes: Tensor, wanted: Tensor, aims: Tensor) -> Tensor:
    """For each query of the teacher, the index of the student's matching query, (B, Q)."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise MissingExtra.of("scipy", "detection", "Distilling a detector") from error
    costs = L1 * torch.cdist(aims, boxes, p=1) + torch.cdist(wanted, found)
    costs = costs.double().nan_to_num()  # with NaN any matching will do: the loss is NaN too
    rows = [linear_sum_assignment(cost)[1] for cost in costs.cpu().numpy()]
    return torch.stack([torch.from_numpy(row) for row in rows]).to(boxes.device)
