"""Random images, by which errors are weighed where no others are given.

They tell what the weights alone do: which inputs of a layer are large, which outputs matter after
the norms that follow. They have the spectrum of photos, whose energy falls with the frequency.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tiedconv.data import TensorList

COUNT = 32
SIZES = (2, 4, 8, 16, 32, 64, 128)
"""Sides of the random grids, each enlarged to the image."""


def random_images(size: tuple[int, int], channels: int = 3) -> TensorList:
    """The same random images each time.

    Args:
        size: height and width.
        channels: of the images, whose values have mean 0 and standard deviation 1.
    """
    generator = torch.Generator().manual_seed(0)
    whole = torch.zeros(COUNT, channels, *size)
    for side in (s for s in SIZES if s <= max(size)):
        grid = torch.randn(COUNT, channels, side, side, generator=generator)
        whole += F.interpolate(grid, size, mode="bilinear", align_corners=False)
    return TensorList(_standardised(whole), torch.zeros(COUNT, dtype=torch.int64))


def _standardised(images: Tensor) -> Tensor:
    return (images - images.mean()) / images.std()
