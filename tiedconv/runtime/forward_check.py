"""The first forward pass: a model that rejects images of this size, and memory that ran out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError, first_line

# What libraries raise for inputs of the wrong size or kind. Anything else is a bug of the model and
# passes through.
_REJECTIONS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


def checked_forward(model: Callable[[Tensor], Any], images: Tensor) -> Any:
    """The model's output for the first images (B, C, H, W).

    Raises:
        UserError: the model rejects images of this size (code `images-rejected`).
    """
    try:
        return model(images)
    except _REJECTIONS as error:
        if is_out_of_memory(error):
            raise
        height, width = images.shape[-2:]
        raise UserError(
            f"The model can't take images of {height} x {width} pixels "
            f"({type(error).__name__}: {first_line(error)})",
            "Nothing can be computed",
            "Choose the size it was made for (--image-size), or leave that option out",
            code="images-rejected",
        ) from error


@torch.no_grad()
def check_size(model: nn.Module, size: int) -> None:
    """Run a model, in evaluation mode, on one black RGB image of `size` x `size` pixels.

    Raises:
        UserError: the model rejects images of this size.
    """
    checked_forward(model, torch.zeros(1, 3, size, size))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, that of an accelerator, or that of torch on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for this.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
