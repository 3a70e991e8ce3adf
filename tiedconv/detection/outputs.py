"""From a detector's output to boxes with classes and scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError

MOST = 100
"""Detections per image that COCO's average precision counts."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    Attributes:
        scores: shape (K,), 0 to 1.
        labels: the model's classes, shape (K,).
        boxes: centre x and y, width and height, as fractions of the image, shape (K, 4).
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor


def parts_of(output: Any) -> tuple[Tensor, Tensor]:
    """Logits (B, Q, C) and boxes (B, Q, 4) in what a detector returns, as float32.

    Raises:
        UserError: there are none.
    """
    logits, boxes = tensor_in(output, "logits"), tensor_in(output, "pred_boxes")
    if logits is None or boxes is None:
        raise UserError(
            f"The model returns {type(output).__name__}, in which no boxes are found",
            "It can't be evaluated or trained as a detector",
            "Use a model that returns .logits and .pred_boxes, as transformers' detectors do",
            code="no-boxes-returned",
        )
    return logits.float(), boxes.float()


def tensor_in(output: Any, name: str) -> Tensor | None:
    """The tensor of this name in a model's output; None if there is none."""
    found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
    return found if isinstance(found, Tensor) else None


def label_count(model: nn.Module, outputs: int) -> int:
    """The model's classes, without one for "no object".

    Args:
        model: has a `num_labels`, itself or in its `config`, or has as many as outputs.
        outputs: logits of each query.
    """
    count = num_labels_from_config(model)
    return count if count is not None and count <= outputs else outputs


def num_labels_from_config(model: nn.Module) -> int | None:
    """The number of classes in the model's `config` or `num_labels`; None without one."""
    config = getattr(model, "config", None)
    count = getattr(config, "num_labels", None) or getattr(model, "num_labels", None)
    return int(count) if isinstance(count, int) else None


def has_no_object(logits: Tensor, labels: int) -> bool:
    """Whether the last logit stands for "no object", so that a softmax gives the probabilities."""
    return logits.shape[-1] == labels + 1


def probabilities(logits: Tensor, labels: int) -> Tensor:
    """(..., labels): by a softmax where the last logit stands for "no object", else sigmoids."""
    if has_no_object(logits, labels):
        return logits.softmax(dim=-1)[..., :-1]
    return logits.sigmoid()


def detections_of(output: Any, model: nn.Module, most: int = MOST) -> list[Detections]:
    """The best detections of each image.

    With sigmoids a query may stand for several classes, as in Deformable DETR; with a softmax it
    stands for its best one, as in DETR.

    Args:
        output: what the model returned.
        model: the detector.
        most: maximum number per image.
    """
    logits, boxes = parts_of(output)
    labels = label_count(model, logits.shape[-1])
    found = probabilities(logits, labels)
    if has_no_object(logits, labels):
        scores, kinds = found.max(dim=-1)
        best, queries = scores.topk(min(most, scores.shape[1]), dim=1)
        kinds = kinds.gather(1, queries)
    else:
        flat = found.flatten(1)
        best, places = flat.topk(min(most, flat.shape[1]), dim=1)
        queries, kinds = places // labels, places % labels
    where = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    best, kinds, where = best.cpu(), kinds.cpu(), where.cpu()
    return [Detections(*image) for image in zip(best, kinds, where, strict=True)]


def corners(boxes: Tensor) -> Tensor:
    """Left, top, right and bottom of boxes (..., 4) given as centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def generalised_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4) given by corners, pair by pair (Rezatofighi et al., 1902.09630)."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    shared, hull = inner.prod(dim=-1), outer.clamp(0).prod(dim=-1)
    areas = [(box[..., 2:] - box[..., :2]).clamp(0).prod(dim=-1) for box in (a, b)]
    union = areas[0] + areas[1] - shared
    small = 1e-30  # of boxes that are points; float32 goes to 1e-38
    return shared / union.clamp(small) - (hull - union) / hull.clamp(small)
