"""Classes drawn from a softmax over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn_class(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Negative log-likelihood of one class drawn for each row, summed.

    Args:
        logits: `(..., classes)`.
        generator: on the CPU.
    """
    probs = logits.detach().softmax(-1).cpu().double().flatten(0, -2)
    drawn = torch.multinomial(probs, 1, generator=generator).to(logits.device)
    return -logits.log_softmax(-1).flatten(0, -2).gather(-1, drawn).sum()


def softmax_divergence(found: Tensor, known: Tensor) -> Tensor:
    """KL(known || found) of logits `(..., classes)`, summed over the rows."""
    found, known = found.log_softmax(-1), known.log_softmax(-1)
    return (known.exp() * (known - found)).sum()
