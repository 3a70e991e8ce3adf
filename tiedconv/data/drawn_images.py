"""Images without a photo: shapes at random, which stand in where nothing else is given.

They tell what the weights do: which inputs of a layer are large, which outputs matter after the
norms and activations that follow. How like photos they are decides how well: with the right
spectrum but no edges, a ResNet rounded to 8 % of its bytes is seven times as far off. Shapes that
cover each other, of many sizes and colours of their own, have both (the dead leaves model; Baradad
et al., "Learning to see by looking at noise", arXiv 2106.05963).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = 20
"""In an image. A third of them is large; of the others there are more the smaller they are."""
SMALLEST, LARGEST = 2.0, 0.5
"""Pixels that the smallest shape reaches from its centre, and the part of an image the largest."""
OWN = 0.5
"""How much a colour differs between channels, where brightness has a standard deviation of 1."""
MEAN, CONTRAST = 0.46, 0.21
"""Of pixels: about those of photos."""


def random_shapes(count: int, size: tuple[int, int], channels: int = 3, *, seed: int = 0) -> Tensor:
    """The same random images each time.

    Args:
        count: how many.
        size: height and width.
        channels: of the images.
        seed: decides which.

    Returns:
        pixels in 0..1, `(count, channels, H, W)`.
    """
    generator = torch.Generator().manual_seed(seed)
    images = _colours(count, channels, generator).expand(count, channels, *size)
    for number in range(SHAPES):
        inside, ramp = _shape(count, size, number < SHAPES // 3, generator)
        shade = OWN * _colours(count, channels, generator) * ramp
        shaded = _colours(count, channels, generator) + shade
        images = torch.where(inside, shaded, images)
    return (MEAN + CONTRAST * images).clamp(0, 1)


def _colours(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """A colour for each image, `(count, channels, 1, 1)`."""
    brightness = torch.randn(count, 1, 1, 1, generator=generator)
    return brightness + OWN * torch.randn(count, channels, 1, 1, generator=generator)


def _shape(
    count: int, size: tuple[int, int], large: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """An ellipse or a rectangle for each image.

    Returns:
        which pixels it covers, and where each lies from one end of it (-1) to the other (1),
        `(count, 1, H, W)`.
    """

    def uniform() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator)

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
