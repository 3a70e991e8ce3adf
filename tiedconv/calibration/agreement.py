"""How often a compact model says what the original does, on images that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.outputs import kind_of
from tiedconv.training.batchnorm import modes_kept


@dataclass(frozen=True)
class Agreement:
    """How far two models say the same.

    Attributes:
        compares: what was compared, such as `same prediction`.
        mean: over the images, 1 where they always do.
        images: how many.
        divergence: KL(original || compact) of the outputs, mean over the images.
        counts: whether the mean is a share of cases, rather than a similarity.
    """

    compares: str
    mean: float
    images: int
    divergence: float
    counts: bool = True


@torch.no_grad()
def measure_agreement(
    model: nn.Module, original: nn.Module, batches: Sequence[Tensor]
) -> Agreement:
    """Compare the outputs of two models, both on the CPU, in evaluation mode.

    Args:
        model: compact.
        original: what it was made of.
        batches: images that nothing was fitted to, `(n, C, H, W)` each.
    """
    found: list[Tensor] = []
    compares, counts, apart, images = "", True, 0.0, 0
    with modes_kept(model), modes_kept(original):
        model.eval(), original.eval()
        for part in batches:
            answer = original(part)
            kind = kind_of(answer, original)
            compares, counts = kind.compares, kind.counts
            output = model(part)
            found.append(kind.agreement(output, answer, model))
            apart += float(kind.distance(output, answer, model)) * len(part)
            images += len(part)
    return Agreement(compares, float(torch.cat(found).mean()), images, apart / images, counts)
