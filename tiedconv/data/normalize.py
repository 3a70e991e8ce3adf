"""uint8 images to the values that a model takes, on the device where they are.

A byte takes a quarter of a float32. So a loader's workers send bytes wherever the data set can give
them (`as_uint8`), and a whole batch is normalised on the device where it is needed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Normalization:
    """What is left to do to an image of bytes: `(x / 255 - mean) / std`.

    Args:
        mean: one value per channel, or None for no subtraction.
        std: one value per channel, or None for no division.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W), uint8, as float32 on the same device, contiguous."""
        values = images.to(torch.float32, memory_format=torch.contiguous_format)
        return self.to_unit(values.div_(255))

    def to_unit(self, values: Tensor) -> Tensor:
        """The same for values (..., C, H, W) that are scaled already; they may be overwritten."""
        if self.mean is not None:
            values.sub_(_columns(self.mean, values.device))
        if self.std is not None:
            values.div_(_columns(self.std, values.device))
        return values


def as_uint8(data: Dataset[Any]) -> tuple[Dataset[Any], Normalization | None]:
    """A data set that gives bytes, and the normalization to apply to them.

    A data set says so itself, by a method `as_uint8()` that returns such a pair, or None if it
    can't. Any other is returned as it is, with None.
    """
    method = getattr(data, "as_uint8", None)
    found: tuple[Dataset[Any], Normalization] | None = method() if method is not None else None
    return found or (data, None)


@functools.lru_cache(maxsize=16)
def _columns(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One number per channel, of shape (C, 1, 1)."""
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return torch.tensor(values, device=device).view(-1, 1, 1)
