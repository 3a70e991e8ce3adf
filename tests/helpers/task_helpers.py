"""Tiny models whose answers follow from colours, and data for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 16
COLOURS = np.array([[220, 20, 20], [20, 220, 20], [20, 20, 220]], np.uint8)


class Segmenter(nn.Module):
    """The class of a pixel is its strongest colour; logits at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 1), nn.Conv2d(24, 3, 1))
        up = torch.eye(3, 24)
        self.body[0].weight.data = up.T.reshape(24, 3, 1, 1).clone()
        self.body[1].weight.data = torch.eye(24).reshape(24, 24, 1, 1)
        self.body[2].weight.data = up.reshape(3, 24, 1, 1).clone()
        for layer in self.body:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": nn.functional.avg_pool2d(self.body(images), 2)}


class Embedder(nn.Module):
    """The features of an image are its mean colours."""

    num_classes = 0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.up.weight.data, self.down.weight.data = torch.eye(6, 3), torch.eye(3, 6)
        for layer in (self.up, self.down):
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.down(self.up(images.mean((2, 3))))
        return features


def segmenter() -> nn.Module:
    return Segmenter().eval()


def embedder() -> nn.Module:
    return Embedder().eval()


def write_masks(
    root: Path, count: int = 4, wrong: int = 0, first_class: int = 0, parts: bool = True
) -> Path:
    """Images of stripes in the three colours, with masks; the last `wrong` columns are lied about.

    Args:
        root: where to write.
        count: images.
        wrong: columns of each mask that say the next class.
        first_class: the value of red.
        parts: whether the images lie in `validation/`.
    """
    part = "validation" if parts else ""
    images, masks = root / "images" / part, root / "annotations" / part
    for folder in (images, masks):
        folder.mkdir(parents=True)
    for i in range(count):
        classes = (np.arange(SIDE) // 4 + i) % 3
        Image.fromarray(COLOURS[np.tile(classes, (SIDE, 1))]).save(images / f"{i}.png")
        told = classes.copy()
        if wrong:
            told[-wrong:] = (told[-wrong:] + 1) % 3
        told = (told + first_class).astype(np.uint8)
        Image.fromarray(np.tile(told, (SIDE, 1))).save(masks / f"{i}.png")
    return root


def write_colours(root: Path, count: int = 8) -> Path:
    """Class folders of noisy images in one colour each, in train/ and val/."""
    draws = np.random.default_rng(0)
    for part in ("train", "val"):
        for name, colour in zip(("red", "green", "blue"), COLOURS, strict=True):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = draws.integers(-20, 20, (SIDE, SIDE, 3))
                Image.fromarray((colour + noise).astype(np.uint8)).save(folder / f"{i}.png")
    return root
