"""Images in memory that calibrations are tested on."""

from __future__ import annotations

from typing import Any

import torch
from micro import all_micros
from torch import Tensor
from torch.utils.data import Dataset

from tiedconv.data import Broken

MICROS = all_micros()


class Images(Dataset[Any]):
    """Images in memory; those of `broken` can't be read."""

    in_memory = True

    def __init__(self, images: Tensor, broken: tuple[int, ...] = ()) -> None:
        self.images, self.broken = images, broken

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        if index in self.broken:
            return Broken(f"image{index}.jpg", "it is broken")
        return self.images[index], -1


def images_of(name: str, count: int) -> Tensor:
    """Seeded inputs of a micro model; each image has a brightness of its own."""
    parts = [MICROS[name].example(torch.Generator().manual_seed(10 + i)) for i in range(count)]
    x = torch.cat([part[:1] for part in parts])
    return x + torch.linspace(-1, 1, count).reshape(-1, *[1] * (x.ndim - 1))
