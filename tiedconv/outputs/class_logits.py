"""Class logits: one row for each image, or for each token of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.detection import tensor_in
from tiedconv.outputs._base import OutputKind, is_multi_label, is_reconstruction
from tiedconv.outputs._softmax import drawn_class, softmax_divergence
from tiedconv.training.losses import distillation_loss, find_logits, logits_of


class ClassLogits(OutputKind):
    """A softmax over the last axis of logits (B, classes), or of named ones (B, n, classes)."""

    name = "class logits"
    compares = "same prediction"

    def matches(self, output: Any, model: nn.Module) -> bool:
        logits = find_logits(output)
        if logits is None or tensor_in(output, "pred_boxes") is not None:
            return False
        if getattr(model, "num_classes", None) == 0:
            return False  # a timm model without its classifier gives features
        if is_reconstruction(output):
            return False  # masked pretraining calls the pixels that it predicts logits
        if logits.ndim == 2 and is_multi_label(model):
            return False
        named = not isinstance(output, Tensor | tuple | list)
        return logits.ndim == 2 or (logits.ndim == 3 and named)

    def values(self, output: Any) -> list[Tensor]:
        return [logits_of(output)]

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return distillation_loss(logits_of(output), logits_of(answer), 1.0)

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        return drawn_class(logits_of(output), generator)

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = (logits_of(part).cpu().double() for part in (output, answer))
        return softmax_divergence(found, known)

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        same = logits_of(output).argmax(-1) == logits_of(answer).argmax(-1)
        return same.float().flatten(1).mean(1) if same.ndim > 1 else same.float()


OUTPUT = ClassLogits()
