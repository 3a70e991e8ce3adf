"""Class logits for each pixel, as semantic segmentation gives them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.detection import tensor_in
from tiedconv.outputs._base import OutputKind, require_same_shapes
from tiedconv.outputs._softmax import drawn_class, softmax_divergence


class DenseLogits(OutputKind):
    """A softmax over the channels of `logits`, or of `out` as torchvision names it, (B, C, H, W).

    The distance is the mean over the pixels: with their sum an image would count by its size.
    """

    name = "class logits of each pixel"
    compares = "same prediction of a pixel"

    def matches(self, output: Any, model: nn.Module) -> bool:
        found = _found(output)
        return found is not None and found.ndim == 4 and found.shape[1] > 1

    def values(self, output: Any) -> list[Tensor]:
        return [_rows(output)]

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = _rows(output), _rows(answer)
        require_same_shapes([found], [known])
        whole = F.kl_div(
            found.log_softmax(-1), known.log_softmax(-1), reduction="sum", log_target=True
        )
        mean: Tensor = whole / (found.shape[0] * found.shape[1])
        return mean

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = _rows(output)
        return drawn_class(rows, generator) / math.sqrt(rows.shape[1])

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = (_rows(part).cpu().double() for part in (output, answer))
        return softmax_divergence(found, known) / found.shape[1]

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        same = _rows(output).argmax(-1) == _rows(answer).argmax(-1)
        return same.float().mean(1)


def logits_in(output: Any) -> Tensor:
    """The logits `(B, classes, H, W)` of an output that matches, float32."""
    found = _found(output)
    assert found is not None  # as `matches` found
    return found.float()


def _found(output: Any) -> Tensor | None:
    found = tensor_in(output, "logits")
    return tensor_in(output, "out") if found is None else found


def _rows(output: Any) -> Tensor:
    """`(B, pixels, classes)`, float32."""
    return logits_in(output).flatten(2).mT


OUTPUT = DenseLogits()
