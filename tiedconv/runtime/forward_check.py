"""What a model gives for images, of which it is not yet known whether it takes such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import TiedconvError, UserError


def checked_forward(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """The model's answer to the first images (B, C, H, W).

    Raises:
        UserError: it can't take such.
    """
    try:
        return model(images)
    except (TiedconvError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # models raise anything, from AssertionError to KeyError
        height, width = images.shape[-2:]
        lines = str(error).splitlines() or [""]
        raise UserError(
            f"The model can't take images of {height} x {width} pixels "
            f"({type(error).__name__}: {lines[0]})",
            "Nothing can be computed",
            "Choose the size it was made for (--image-size), or leave that option out",
        ) from error


@torch.no_grad()
def check_size(model: nn.Module, size: int) -> None:
    """Raises UserError where a model, in evaluation mode, can't take RGB images of this size."""
    checked_forward(model, torch.zeros(1, 3, size, size))
