"""Multi-label logits: each class is there or not, whatever the others are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.outputs._base import OutputKind, is_multi_label, require_same_shapes
from tiedconv.training.losses import find_logits, logits_of


class MultiLabel(OutputKind):
    """A sigmoid of each logit (B, classes), where the configuration says that labels are many.

    The distance is the sum over the classes of the divergences of two Bernoulli variables.
    """

    name = "multi-label logits"
    compares = "same labels"

    def matches(self, output: Any, model: nn.Module) -> bool:
        logits = find_logits(output)
        return logits is not None and logits.ndim == 2 and is_multi_label(model)

    def values(self, output: Any) -> list[Tensor]:
        return [logits_of(output)]

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = logits_of(output), logits_of(answer)
        require_same_shapes([found], [known])
        return _divergences(found, known).sum() / len(found)

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        logits = logits_of(output)
        chance = logits.detach().sigmoid().cpu()
        drawn = torch.bernoulli(chance, generator=generator).to(logits.device)
        return F.binary_cross_entropy_with_logits(logits, drawn, reduction="sum")

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = (logits_of(part).cpu().double() for part in (output, answer))
        return _divergences(found, known).sum()

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        same = (logits_of(output) > 0) == (logits_of(answer) > 0)
        return same.float().mean(1)


def _divergences(found: Tensor, known: Tensor) -> Tensor:
    """KL of Bernoulli variables with these logits, for each of them."""
    chance = known.sigmoid()
    return chance * (F.logsigmoid(known) - F.logsigmoid(found)) + (1 - chance) * (
        F.logsigmoid(-known) - F.logsigmoid(-found)
    )


OUTPUT = MultiLabel()
