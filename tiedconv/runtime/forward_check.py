"""The first forward pass: a model that rejects images of this size, and memory that ran out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError, first_line
from tiedconv.runtime.call_hooks import (
    LONGEST,
    hooked,
    is_fed,
    random_text,
    takes_text_too,
    text_hooks,
)

# What libraries raise for inputs of the wrong size or kind. Anything else is a bug of the model and
# passes through.
_REJECTIONS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


def further_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What a model of transformers takes besides images, to try it: random text for each image.

    Of as many tokens as the model takes, as tokenizers pad it. Empty for a model that takes images
    alone, or as its first input.
    """
    if not takes_text_too(model):
        return {}
    return {"input_ids": random_text(model, images, LONGEST)}


def token_count(model: nn.Module, images: Tensor) -> int:
    """Tokens of a text, beside an image or alone; 0 for a model that takes images alone."""
    if not images.is_floating_point():
        return images.shape[1]
    found = further_inputs(model, images[:1]).get("input_ids")
    return 0 if found is None else found.shape[1]


def checked_forward(model: Callable[..., Any], images: Tensor, **further: Tensor) -> Any:
    """The model's output for the first images (B, C, H, W).

    Args:
        model: called with the images; by name (`pixel_values`) if there are further inputs.
        images: the images.
        further: from `further_inputs`.

    Raises:
        UserError: the model rejects images of this size (code `images-rejected`), or reads text
            (`model-takes-text`).
    """
    try:
        return model(pixel_values=images, **further) if further else model(images)
    except (*_REJECTIONS, AttributeError) as error:
        if is_out_of_memory(error) or not _is_rejection(model, error, further):
            raise
        is_image = images.is_floating_point()
        if is_image and not further and takes_text(model) and not is_fed(model):
            raise UserError(
                f"The model reads text (input_ids), and got images ({type(error).__name__}: "
                f"{first_line(error)})",
                "Images alone can't calibrate, evaluate or train it",
                "Convert it without images; in Python, calibrate it on dicts of token ids; of a "
                "model of both, give the vision tower, such as CLIPVisionModel",
                code="model-takes-text",
            ) from error
        if not is_image:
            raise UserError(
                f"The model can't take token ids alone ({type(error).__name__}: "
                f"{first_line(error)})",
                "Nothing can be computed",
                "It may take further inputs, which only Python can give it",
                code="images-rejected",
            ) from error
        height, width = images.shape[-2:]
        raise UserError(
            f"The model can't take images of {height} x {width} pixels "
            f"({type(error).__name__}: {first_line(error)})",
            "Nothing can be computed",
            "Choose the size it was made for (--image-size), or leave that option out",
            code="images-rejected",
        ) from error


def takes_text(model: Callable[..., Any]) -> bool:
    """Whether the first input of a model of transformers is token ids."""
    if not isinstance(model, nn.Module):
        return False
    names = list(inspect.signature(model.forward).parameters)
    return bool(names) and names[0] == "input_ids"


def _is_rejection(
    model: Callable[..., Any], error: Exception, further: Mapping[str, Tensor]
) -> bool:
    """Whether an error comes of the images. A missing text gives AttributeErrors."""
    if not isinstance(error, AttributeError):
        return True
    zero = torch.zeros(1, 3, 1, 1)
    takes_more = isinstance(model, nn.Module) and bool(further_inputs(model, zero))
    return takes_more and not further


@torch.no_grad()
def check_size(model: nn.Module, size: int, channels: int = 3) -> None:
    """Run a model, in evaluation mode, on one black image of `size` x `size` pixels.

    Raises:
        UserError: the model rejects images of this size.
    """
    with hooked(model, text_hooks(model)):
        checked_forward(model, torch.zeros(1, channels, size, size))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, that of an accelerator, or that of torch on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for this.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
