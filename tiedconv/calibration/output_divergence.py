"""How far a model's outputs are from the original's, on the images of a calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.data import Loader
from tiedconv.outputs import kind_of
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.training import pick_device
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.device import Placement

IMAGES = 512
"""That decide between models, at most."""


@torch.no_grad()
def mean_divergence(
    model: nn.Module,
    original: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int = 32,
    device: str = "auto",
    workers: int | None = None,
) -> float:
    """The mean divergence of a model's outputs from the original's, in nats for each image.

    Args:
        model: compact, on the CPU; it is moved to the device and back.
        original: what it was made of; likewise.
        data: images.
        batch_size: images at a time.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.

    Raises:
        DataError: no image could be read.
    """
    chosen = pick_device(device)
    placement = Placement.choose(original, chosen, "off")
    loader = Loader(data, batch_size, workers=workers, device=chosen)
    total, images = 0.0, 0
    try:
        with modes_kept(model), modes_kept(original):
            for each in (model, original):
                placement.place(each)
                each.eval()
            for batch in loader.epoch():
                if not len(batch.images):
                    continue
                inputs = placement.images(batch.images)
                answer = checked_forward(original, inputs)
                kind = kind_of(answer, original)
                total += float(kind.divergence(model(inputs), answer, model))
                images += len(batch.images)
                if images >= IMAGES:
                    break
    finally:
        loader.close()
        model.cpu(), original.cpu()
    return total / max(1, images)
