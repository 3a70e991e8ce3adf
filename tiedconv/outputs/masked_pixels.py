"""Pixels that masked pretraining predicts: ViT-MAE, VideoMAE."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tiedconv.outputs._base import is_reconstruction
from tiedconv.outputs.features import Features
from tiedconv.training.losses import logits_of


class MaskedPixels(Features):
    """What transformers calls `logits` (B, patches, pixels) beside `ids_restore`: no classes.

    Each patch is a row of `Features`; the mask beside them is the same for every model.
    """

    name = "masked pixels"
    compares = "cosine of the pixels"
    last = False

    def matches(self, output: Any, model: nn.Module) -> bool:
        return is_reconstruction(output)

    def values(self, output: Any) -> list[Tensor]:
        return [logits_of(output)]


OUTPUT = MaskedPixels()
