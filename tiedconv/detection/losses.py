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
    tensor_in,
)
from tiedconv.errors import MissingExtra, UserError
from tiedconv.training.losses import class_logits_of, distillation_loss, logits_of

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


def output_distance(output: Any, answer: Any, model: nn.Module) -> Tensor:
    """The distillation loss: `detection_distillation_loss` of a detector, else KL divergence.

    Args:
        output: of the student.
        answer: of the teacher.
        model: the student.
    """
    if tensor_in(output, "pred_boxes") is not None:
        return detection_distillation_loss(output, answer, model)
    return distillation_loss(class_logits_of(output), class_logits_of(answer), 1.0)


def drawn_loss(output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of outputs sampled from the predicted distribution, summed.

    The second moment of its gradients is the Fisher matrix. A classifier's classes are sampled
    from its softmax; a detector's independently where it has sigmoids, and its boxes from a
    Laplace distribution, whose likelihood falls as L1 does in `detection_distillation_loss`.

    Args:
        output: of the model.
        model: the model.
        generator: of the samples, on the CPU.
    """
    boxes = tensor_in(output, "pred_boxes")
    if boxes is None:
        return _drawn_class(class_logits_of(output), generator)
    logits = logits_of(output)
    labels = label_count(model, logits.shape[-1])
    probs = probabilities(logits.detach(), labels)
    if has_no_object(logits, labels):
        classes = _drawn_class(logits, generator)
    else:
        drawn = torch.rand(logits.shape, generator=generator).to(logits.device) < probs
        classes = F.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="sum")
    signs = torch.randint(2, boxes.shape, generator=generator).to(boxes.device) * 2.0 - 1
    confidence = probs.max(dim=-1, keepdim=True).values
    total: Tensor = classes + L1 * (confidence * signs * boxes.float()).sum()
    return total


@torch.no_grad()
def divergence(output: Any, answer: Any, model: nn.Module) -> Tensor:
    """KL(answer || output) of what `drawn_loss` draws from, summed over images.

    Args:
        output: of a changed model.
        answer: of the model as it was.
        model: either of them.
    """
    found, known = (logits_of(part).cpu().double() for part in (output, answer))
    if tensor_in(answer, "pred_boxes") is None:
        class_logits_of(answer)
        return _softmax_divergence(found, known)
    boxes, aims = (parts_of(part)[1].cpu().double() for part in (output, answer))
    labels = label_count(model, known.shape[-1])
    probs = probabilities(known, labels)
    if has_no_object(known, labels):
        classes = _softmax_divergence(found, known)
    else:
        yes = F.logsigmoid(known) - F.logsigmoid(found)
        no = F.logsigmoid(-known) - F.logsigmoid(-found)
        classes = (probs * yes + (1 - probs) * no).sum()
    box_distance = L1 * probs.max(dim=-1, keepdim=True).values * (boxes - aims).abs()
    return classes + (box_distance + torch.expm1(-box_distance)).sum()


def top_predictions(output: Any, model: nn.Module) -> Tensor:
    """The predicted class of each image, (B,); of a detector that of its most confident box."""
    logits = logits_of(output)
    if tensor_in(output, "pred_boxes") is None:
        return logits.argmax(-1).cpu()
    labels = label_count(model, logits.shape[-1])
    return (probabilities(logits, labels).flatten(1).argmax(-1) % labels).cpu()


def _softmax_divergence(found: Tensor, known: Tensor) -> Tensor:
    found, known = found.log_softmax(-1), known.log_softmax(-1)
    return (known.exp() * (known - found)).sum()


def _drawn_class(logits: Tensor, generator: torch.Generator) -> Tensor:
    probs = logits.detach().softmax(-1).cpu().double().flatten(0, -2)
    drawn = torch.multinomial(probs, 1, generator=generator).to(logits.device)
    return -logits.log_softmax(-1).flatten(0, -2).gather(-1, drawn).sum()
