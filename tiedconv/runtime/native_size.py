"""The image size that a model was built for, where it says so."""

from __future__ import annotations

from typing import Any

from torch import nn


def native_size(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in pixels; None for a model that says nothing or takes any size.

    Read from `config.image_size` (transformers), `patch_embed.img_size` (timm) or `image_size`
    (torchvision).
    """
    config = getattr(model, "config", None)
    places: tuple[Any, ...] = (
        getattr(config, "image_size", None),
        getattr(getattr(config, "vision_config", None), "image_size", None),
        getattr(getattr(model, "patch_embed", None), "img_size", None),
        getattr(model, "image_size", None),
    )
    for size in places:
        if isinstance(size, int):
            return size, size
        if isinstance(size, tuple | list) and len(size) == 2 and all(type(n) is int for n in size):
            return int(size[0]), int(size[1])
    return None
