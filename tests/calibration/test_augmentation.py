"""Augmentation of calibration images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiedconv.calibration.augmentation import (
    CORNERS,
    PART,
    augmented,
    corner_copies,
    is_images,
)


def cut_from_padded(image: Tensor, down: int, right: int) -> Tensor:
    """The same shift by PyTorch's padding: `(C, H, W)`."""
    height, width = image.shape[-2:]
    padded = F.pad(image[None], (width - 1,) * 2 + (height - 1,) * 2, mode="reflect")[0]
    top, left = height - 1 - down, width - 1 - right
    return padded[:, top : top + height, left : left + width]


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 100))
def test_a_copy_is_a_cut_from_the_reflected_image_or_its_mirror(
    height: int, width: int, seed: int
) -> None:
    images = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(seed))
    found = augmented(images, np.random.default_rng(seed))
    down, right = max(1, height // PART), max(1, width // PART)
    for image, copy in zip(images, found, strict=True):
        assert any(
            torch.equal(other, cut_from_padded(image, y, x))
            for other in (copy, copy.flip(-1))
            for y in range(-down, down + 1)
            for x in range(-right, right + 1)
        )


def test_images_are_augmented_apart_and_the_same_again() -> None:
    images = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    found = augmented(images, np.random.default_rng(0))
    assert len({copy.numpy().tobytes() for copy in found}) > 8
    assert torch.equal(found, augmented(images, np.random.default_rng(0)))
    assert not torch.equal(found, augmented(images, np.random.default_rng(1)))


def test_the_frames_of_a_clip_are_augmented_alike() -> None:
    frame = torch.randn(1, 1, 3, 16, 16)
    (found,) = augmented(frame.expand(1, 4, -1, -1, -1), np.random.default_rng(3))
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("size", [2, 15, 16, 224])
def test_copies_to_all_corners_begin_with_the_image(size: int) -> None:
    images = torch.randn(2, 3, size, size)
    copies = list(corner_copies(images))
    by = -(-max(1, size // PART) // 2)
    assert torch.equal(copies[0], images)
    for copy, (down, right) in zip(copies, CORNERS, strict=True):
        assert torch.equal(copy[1], cut_from_padded(images[1], down * by, right * by))


@pytest.mark.parametrize(
    ("samples", "able"),
    [
        (torch.zeros(2, 3, 8, 8), True),
        (torch.zeros(2, 4, 3, 8, 8), True),
        (torch.zeros(2, 1), False),
        (torch.zeros(2, 7, 3), False),
        (torch.zeros(2, 3, 1, 8), False),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), False),
    ],
)
def test_only_images_are_augmented(samples: Tensor, able: bool) -> None:
    assert is_images(samples) is able
