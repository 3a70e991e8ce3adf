"""Boxes with class logits, as detection transformers give them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.detection import detection_distillation_loss, tensor_in
from tiedconv.detection.losses import L1
from tiedconv.detection.outputs import has_no_object, label_count, parts_of, probabilities
from tiedconv.outputs._base import OutputKind
from tiedconv.outputs._softmax import drawn_class, softmax_divergence


class Boxes(OutputKind):
    """`logits` (B, Q, classes) and `pred_boxes` (B, Q, 4).

    Classes are drawn independently where the model has sigmoids, and boxes from a Laplace
    distribution, whose likelihood falls as L1 does in `detection_distillation_loss`.
    """

    name = "boxes"
    compares = "same class of the most confident box"

    def matches(self, output: Any, model: nn.Module) -> bool:
        return tensor_in(output, "pred_boxes") is not None

    def values(self, output: Any) -> list[Tensor]:
        return list(parts_of(output))

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return detection_distillation_loss(output, answer, model)

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        logits, boxes = parts_of(output)
        labels = label_count(model, logits.shape[-1])
        probs = probabilities(logits.detach(), labels)
        if has_no_object(logits, labels):
            classes = drawn_class(logits, generator)
        else:
            drawn = torch.rand(logits.shape, generator=generator).to(logits.device) < probs
            classes = F.binary_cross_entropy_with_logits(logits, drawn.float(), reduction="sum")
        signs = torch.randint(2, boxes.shape, generator=generator).to(boxes.device) * 2.0 - 1
        confidence = probs.max(dim=-1, keepdim=True).values
        total: Tensor = classes + L1 * (confidence * signs * boxes).sum()
        return total

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        (found, boxes), (known, aims) = (
            (part.cpu().double() for part in parts_of(each)) for each in (output, answer)
        )
        labels = label_count(model, known.shape[-1])
        probs = probabilities(known, labels)
        if has_no_object(known, labels):
            classes = softmax_divergence(found, known)
        else:
            yes = F.logsigmoid(known) - F.logsigmoid(found)
            no = F.logsigmoid(-known) - F.logsigmoid(-found)
            classes = (probs * yes + (1 - probs) * no).sum()
        apart = L1 * probs.max(dim=-1, keepdim=True).values * (boxes - aims).abs()
        return classes + (apart + torch.expm1(-apart)).sum()

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return (_best_class(output, model) == _best_class(answer, model)).float()


def _best_class(output: Any, model: nn.Module) -> Tensor:
    logits, _ = parts_of(output)
    labels = label_count(model, logits.shape[-1])
    return probabilities(logits, labels).flatten(1).argmax(-1) % labels


OUTPUT = Boxes()
