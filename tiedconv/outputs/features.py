"""Features, tokens, maps, depth: any other floating-point tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError
from tiedconv.outputs._base import OutputKind, kept_rows, mean_of_rows, require_same_shapes
from tiedconv.runtime.outputs import named_outputs

_SMALLEST = 1e-3  # energy of a row, relative to the mean: a token near zero must not decide alone


class Features(OutputKind):
    """Each row `y` of a tensor is the mean of a Gaussian whose total variance is `|y|^2`.

    A row is a token of (B, D) or (B, n, D), and a whole image of a map (B, C, H, W). The distance
    of two models is half the relative squared error of their rows, about 1 - cosine, mean over the
    rows and then over the tensors: the one class token beside hundreds of patches counts where
    the model returns it by itself, as transformers do (`pooler_output`).
    """

    name = "features"
    compares = "cosine of the features"
    counts = False
    last = True

    def matches(self, output: Any, model: nn.Module) -> bool:
        return bool(named_outputs(output))

    def values(self, output: Any) -> list[Tensor]:
        found = named_outputs(output)
        floating = [t for t in found.values() if t.is_floating_point() and t.ndim]
        if not floating:
            raise UserError(
                f"The model returns no floating-point tensors, but {', '.join(found)}",
                "There is nothing to compare",
                "Use a model that returns logits, boxes or features",
                code="no-tensors-returned",
            )
        return [_rows(t.float()) for t in floating]

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        found, known = self.values(output), self.values(answer)
        require_same_shapes(found, known)
        parts = []
        for x, y in zip(found, known, strict=True):
            kept = kept_rows(x, model)
            errors = (x - y).square().sum(-1) / _scales(x, y, kept)
            parts.append((errors if kept is None else mean_of_rows(errors, kept)).mean() / 2)
        return torch.stack(parts).mean()

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        values = self.values(output)
        losses = []
        for x in values:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            kept = kept_rows(x, model)
            rows: Any = x.shape[1] if kept is None else kept.sum(1, keepdim=True)
            scale = (_energies(x.detach(), kept) * rows * len(values)).rsqrt()
            if kept is not None:
                scale = scale.masked_fill(~kept, 0.0)
            losses.append((noise * x * scale.unsqueeze(-1)).sum())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        images = len(self.values(answer)[0])
        return self.distance(output, answer, model).double().cpu() * images

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        pairs = zip(self.values(output), self.values(answer), strict=True)
        found = [
            mean_of_rows(torch.cosine_similarity(x, y, -1), kept_rows(x, model)) for x, y in pairs
        ]
        return torch.stack(found).mean(0)


def _rows(tensor: Tensor) -> Tensor:
    """`(B, rows, width)`."""
    if tensor.ndim == 3:
        return tensor
    return tensor.reshape(len(tensor), 1, math.prod(tensor.shape[1:]))


def _scales(found: Tensor, known: Tensor, kept: Tensor | None) -> Tensor:
    """What squared errors of rows are divided by: the energy of what is known, if there is any."""
    own = found.detach().square().sum(-1)
    return torch.maximum(_energies(known, kept), _SMALLEST * own)


def _energies(rows: Tensor, kept: Tensor | None) -> Tensor:
    """Squared norm of each row, `(B, rows)`."""
    energies = rows.square().sum(-1)
    counted = energies.detach() if kept is None else energies.detach()[kept]
    return energies.clamp(min=max(_SMALLEST * float(counted.mean()), 1e-20))


OUTPUT = Features()
