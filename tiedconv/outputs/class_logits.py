"""Class logits: one row for each image, or for each token of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.detection import tensor_in
from tiedconv.outputs._base import (
    OutputKind,
    is_multi_label,
    is_reconstruction,
    kept_rows,
    mean_of_rows,
)
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
        found, known = logits_of(output), logits_of(answer)
        kept = kept_rows(found, model)
        if kept is None or found.shape != known.shape:
            return distillation_loss(found, known, 1.0)
        return softmax_divergence(found[kept], known[kept]) / len(found)

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        logits = logits_of(output)
        kept = kept_rows(logits, model)
        return drawn_class(logits if kept is None else logits[kept], generator)

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = (logits_of(part).cpu().double() for part in (output, answer))
        kept = kept_rows(found, model)
        return softmax_divergence(*((found, known) if kept is None else (found[kept], known[kept])))

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        same = logits_of(output).argmax(-1) == logits_of(answer).argmax(-1)
        if same.ndim < 2:
            return same.float()
        return mean_of_rows(same.float().flatten(1), kept_rows(same, model))


OUTPUT = ClassLogits()
