"""Image and text embeddings in one space, as CLIP and SigLIP give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.detection import tensor_in
from tiedconv.outputs._base import OutputKind
from tiedconv.outputs.features import Features

_NAMES = ("image_embeds", "text_embeds")


class TwoTowers(OutputKind):
    """Features, of which only the two embeddings count.

    Their products are the similarities, `(texts, images)`: a pair is of one image and one text
    whatever else is in a batch, so each embedding is compared by itself (`features.Features`).
    Hidden states of the towers, which such a model returns too, serve no one.
    """

    name = "image and text embeddings"
    compares = "cosine of the embeddings"
    counts = False
    _features = Features()

    def matches(self, output: Any, model: nn.Module) -> bool:
        return all(tensor_in(output, name) is not None for name in _NAMES)

    def values(self, output: Any) -> list[Tensor]:
        return self._features.values(_embeddings(output))

    def distance(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return self._features.distance(_embeddings(output), _embeddings(answer), model)

    def drawn_loss(self, output: Any, model: nn.Module, generator: torch.Generator) -> Tensor:
        return self._features.drawn_loss(_embeddings(output), model, generator)

    def divergence(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return self._features.divergence(_embeddings(output), _embeddings(answer), model)

    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        return self._features.agreement(_embeddings(output), _embeddings(answer), model)


def _embeddings(output: Any) -> dict[str, Tensor]:
    found = {name: tensor_in(output, name) for name in _NAMES}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


OUTPUT = TwoTowers()
