"""Random images, by which errors are weighed where no others are given.

They tell what the weights do: which inputs of a layer are large, which outputs matter after the
norms and activations that follow. How like photos they are decides how well: with the right
spectrum but no edges, integers of a ResNet at 8 % of its bytes are three times as far off. Shapes
that cover each other, of many sizes and colours of their own, have both (the dead leaves model;
Baradad et al., "Learning to see by looking at noise", arXiv 2106.05963).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiedconv.data import TensorList

COUNT = 128
SHAPES = 20
"""In an image. A third of them is large; of the others there are more the smaller they are."""
SMALLEST, LARGEST = 2.0, 0.5
"""Pixels that the smallest shape reaches from its centre, and the part of an image the largest."""
OWN = 0.5
"""How much a colour differs between channels, where brightness has a standard deviation of 1."""


def random_images(size: tuple[int, int], channels: int = 3) -> TensorList:
    """The same random images each time.

    Args:
        size: height and width.
        channels: of the images, whose values have mean 0 (each channel) and standard deviation 1.
    """
    generator = torch.Generator().manual_seed(0)
    images = _colours(channels, generator).expand(COUNT, channels, *size)
    for number in range(SHAPES):
        inside, ramp = _shape(size, number < SHAPES // 3, generator)
        shaded = _colours(channels, generator) + OWN * _colours(channels, generator) * ramp
        images = torch.where(inside, shaded, images)
    return TensorList(_standardised(images), torch.zeros(COUNT, dtype=torch.int64))


def _colours(channels: int, generator: torch.Generator) -> Tensor:
    """A colour for each image, `(COUNT, channels, 1, 1)`."""
    brightness = torch.randn(COUNT, 1, 1, 1, generator=generator)
    return brightness + OWN * torch.randn(COUNT, channels, 1, 1, generator=generator)


def _shape(size: tuple[int, int], large: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An ellipse or a rectangle for each image.

    Returns:
        which pixels it covers, and where each lies from one end of it (-1) to the other (1),
        `(COUNT, 1, H, W)`.
    """

    def uniform() -> Tensor:
        return torch.rand(COUNT, 1, 1, 1, generator=generator)

    longer = max(size)
    smallest = min(SMALLEST / longer, LARGEST)
    share = uniform()
    if large:
        reach = smallest + (LARGEST - smallest) * share
    else:  # each octave of sizes covers as much in all, as in photos
        reach = (smallest**-2 + share * (LARGEST**-2 - smallest**-2)) ** -0.5
    y = (torch.arange(size[0]) + 0.5).view(-1, 1) / longer - uniform()
    x = (torch.arange(size[1]) + 0.5) / longer - uniform()
    angle, thinness = math.pi * uniform(), 0.3 + 0.7 * uniform()
    along = (x * angle.cos() + y * angle.sin()) / reach
    across = (y * angle.cos() - x * angle.sin()) / reach / thinness
    ellipse = along.square() + across.square() < 1
    rectangle = torch.maximum(along.abs(), across.abs()) < 1
    return torch.where(uniform() < 0.5, rectangle, ellipse), along.clamp(-1, 1)


def _standardised(images: Tensor) -> Tensor:
    images = images - images.mean((0, 2, 3), keepdim=True)
    return images / images.std()
