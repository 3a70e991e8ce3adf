"""The set loss: each object is given to one query, at every stage.

As in DETR (Carion et al., ECCV 2020), with the focal loss of Deformable DETR (Zhu et al., ICLR
2021) for the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, logsigmoid

from adamixer.boxes import giou

CLASS, L1, GIOU = 2.0, 5.0, 2.0  # weights, in the matching as in the loss
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss


@dataclass(frozen=True)
class Objects:
    """What is to be found in one image.

    Args:
        labels: classes, (objects,) int64.
        boxes: corners in pixels, (objects, 4).
        size: width and height of the image in pixels.
    """

    labels: Tensor
    boxes: Tensor
    size: tuple[int, int]


def focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Lin et al., ICCV 2017, equation 5, for independent classes: the sum over all entries.

    Args:
        logits: of any shape.
        targets: of the same shape, 0 or 1.
    """
    p = logits.sigmoid()
    entropy = binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p * (1 - targets) + (1 - p) * targets
    weight = ALPHA * targets + (1 - ALPHA) * (1 - targets)
    return (weight * wrong**GAMMA * entropy).sum()


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """By how much the focal loss changes when a query has to answer with a label.

    Args:
        logits: (queries, classes)
        labels: (objects,)

    Returns:
        (queries, objects)
    """
    asked = logits[:, labels]
    p = asked.sigmoid()
    present = -ALPHA * (1 - p) ** GAMMA * logsigmoid(asked)
    absent = -(1 - ALPHA) * p**GAMMA * logsigmoid(-asked)
    return present - absent


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """Queries and objects that belong together, one to one, at the least total cost.

    Args:
        logits: of one image, (queries, classes).
        boxes: corners in pixels, (queries, 4).
        objects: at most as many as queries, or some stay without one.

    Returns:
        the matched queries and, in the same order, the objects: two int64 vectors.
    """
    scale = boxes.new_tensor([*objects.size, *objects.size])
    cost = (
        CLASS * class_cost(logits, objects.labels)
        + L1 * torch.cdist(boxes / scale, objects.boxes / scale, p=1)
        - GIOU * giou(boxes[:, None], objects.boxes[None])
    )
    rows, columns = linear_sum_assignment(cost.double().cpu().numpy())
    return torch.as_tensor(rows).to(cost.device), torch.as_tensor(columns).to(cost.device)


def image_loss(logits: Tensor, boxes: Tensor, objects: Objects) -> Tensor:
    """The loss of one stage on one image, a sum over its objects: arguments as in `match`."""
    queries, found = match(logits, boxes, objects)
    targets = torch.zeros_like(logits)
    targets[queries, objects.labels[found]] = 1
    scale = boxes.new_tensor([*objects.size, *objects.size])
    mine, wanted = boxes[queries], objects.boxes[found]
    return (
        CLASS * focal_loss(logits, targets)
        + L1 * l1_loss(mine / scale, wanted / scale, reduction="sum")
        + GIOU * (1 - giou(mine, wanted)).sum()
    )


def set_loss(logits: Tensor, boxes: Tensor, batch: Sequence[Objects]) -> Tensor:
    """The sum over stages, for each object of the batch.

    Args:
        logits: (stages, batch, queries, classes)
        boxes: corners in pixels, (stages, batch, queries, 4).
        batch: what each image holds.
    """
    losses = [
        image_loss(logits[stage, i], boxes[stage, i], objects)
        for stage in range(len(logits))
        for i, objects in enumerate(batch)
    ]
    return torch.stack(losses).sum() / max(1, sum(len(o.labels) for o in batch))
