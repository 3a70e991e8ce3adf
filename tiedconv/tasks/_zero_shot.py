"""Classes by their embeddings: a model of two towers as a classifier, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from tiedconv.errors import UserError
from tiedconv.sources import read_weights
from tiedconv.tasks._base import features_of, normalised

SCALE = 100.0
"""Of cosines, to logits: where CLIP's own scale ends (Radford et al., arXiv 2103.00020)."""


class ZeroShot:
    """Turns what a model returns into logits, by the cosine of its features to each class.

    Args:
        path: a safetensors file of one matrix `(classes, width)`.

    Raises:
        UserError: the file holds something else (`class-embeddings-unreadable`).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        found = list(read_weights(path).tensors.values())
        if len(found) != 1 or found[0].ndim != 2:
            raise UserError(
                f"{path} holds {len(found)} tensors of the shapes "
                f"{', '.join(str(tuple(t.shape)) for t in found[:4])}",
                "Class embeddings are one matrix",
                "Save the text embeddings of all classes as one tensor (classes, width)",
                code="class-embeddings-unreadable",
            )
        self.classes = normalised(found[0])

    def __call__(self, output: Any) -> dict[str, Tensor]:
        """The logits `(B, classes)`.

        Raises:
            UserError: the features have another width (`class-embeddings-unfit`).
        """
        features = normalised(features_of(output))
        if features.shape[1] != self.classes.shape[1]:
            raise UserError(
                f"The model's features have {features.shape[1]} numbers, the embeddings of "
                f"{self.path} {self.classes.shape[1]}",
                "They are not of one space",
                "Embed the class names with the text tower of the same model, or choose another "
                "output with --output-name",
                code="class-embeddings-unfit",
            )
        return {"logits": SCALE * features @ self.classes.to(features.device).T}
