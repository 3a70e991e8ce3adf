"""How far a model's outputs are from the original's, on the images of a calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Loader
from tiedconv.outputs import kind_of
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.training import pick_device
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.device import Placement

CLEARLY = 2.0
"""Standard errors between two models, from which on their order is taken for no chance."""

IMAGES = 512
"""That decide between models, at most."""


@torch.no_grad()
def divergences(
    model: nn.Module,
    original: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int = 32,
    device: str = "auto",
    workers: int | None = None,
) -> Tensor:
    """The mean divergence of a model's outputs from the original's, for each batch of images.

    Args:
        model: compact, on the CPU; it is moved to the device and back.
        original: what it was made of; likewise.
        data: images.
        batch_size: images at a time.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.

    Returns:
        KL divergence for each image, `(batches,)`; of two models, the same batches.
    """
    chosen = pick_device(device)
    placement = Placement.choose(original, chosen, "off")
    loader = Loader(data, batch_size, workers=workers, device=chosen)
    found: list[float] = []
    images = 0
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
                total = float(kind.divergence(model(inputs), answer, model))
                found.append(total / len(batch.images))
                images += len(batch.images)
                if images >= IMAGES:
                    break
    finally:
        loader.close()
        model.cpu(), original.cpu()
    return torch.tensor(found, dtype=torch.float64)


def is_clearly_less(some: Tensor, others: Tensor) -> bool:
    """Whether divergences are less than others of the same batches by more than chance.

    Args:
        some, others: from `divergences`, `(batches,)`.
    """
    gain = others - some
    if len(gain) < 2:
        return bool(gain.mean() > 0)
    return bool(gain.mean() > CLEARLY * gain.std() / len(gain) ** 0.5)
