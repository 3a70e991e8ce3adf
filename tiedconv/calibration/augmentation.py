"""Augmentation of calibration images, so that the fit of the whole model sees more of them.

A few hundred images are soon fitted better than others are. The original answers for any image,
so mirrored and shifted ones need no labels. What comes in over the border of a shifted image is
its reflection.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PART = 8
"""A shift is at most this part of the height and of the width; at least one pixel."""

CORNERS = ((0, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
"""Directions of the copies that an error is measured on; the first is the image as it is."""


def is_images(samples: Tensor) -> bool:
    """Whether samples are images `(B, ..., C, H, W)`, not numbers of samples or tokens."""
    return samples.ndim >= 4 and samples.is_floating_point() and min(samples.shape[-2:]) > 1


def augmented(images: Tensor, draws: np.random.Generator) -> Tensor:
    """A copy in which half of the images are mirrored, and each is shifted by up to an eighth.

    Args:
        images: `(B, ..., H, W)`.
        draws: decide which, and how far.
    """
    down, right = (_most(length) for length in images.shape[-2:])
    found = torch.empty_like(images)
    for i, image in enumerate(images):
        moved = _shifted(
            image, int(draws.integers(-down, down + 1)), int(draws.integers(-right, right + 1))
        )
        found[i] = moved.flip(-1) if draws.random() < 0.5 else moved
    return found


def corner_copies(images: Tensor) -> Iterator[Tensor]:
    """Copies shifted by half of the largest shift, in the directions of `CORNERS`.

    Args:
        images: `(B, ..., H, W)`.
    """
    down, right = (-(-_most(length) // 2) for length in images.shape[-2:])
    for vertical, horizontal in CORNERS:
        yield _shifted(images, vertical * down, horizontal * right)


def _most(length: int) -> int:
    return max(1, length // PART)


def _shifted(images: Tensor, down: int, right: int) -> Tensor:
    rows, columns = (
        _reflected(length, -by) for length, by in zip(images.shape[-2:], (down, right), strict=True)
    )
    return images[..., rows[:, None], columns]


def _reflected(length: int, start: int) -> Tensor:
    """Places `start` to `start + length`, those outside of `0` to `length` reflected into it."""
    places = (torch.arange(length) + start).abs()
    return (length - 1) - ((length - 1) - places).abs()
