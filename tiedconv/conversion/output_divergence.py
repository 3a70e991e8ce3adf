"""How far a model's outputs are from the original's, on the images of a calibration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.conversion.calibrate import Calibration
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
    model: nn.Module, original: nn.Module, data: Dataset[Any], calib: Calibration
) -> float:
    """The mean divergence of a model's outputs from the original's, in nats for each image.

    Args:
        model: compact, on the CPU; it is moved to the device of the calibration and back.
        original: what it was made of; likewise.
        data: images, from `Calibration.open`.
        calib: how they are read.

    Raises:
        DataError: no image could be read.
    """
    device = pick_device(calib.device)
    placement = Placement.choose(original, device, "off")
    loader = Loader(data, calib.config.batch_size, workers=calib.workers, device=device)
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
