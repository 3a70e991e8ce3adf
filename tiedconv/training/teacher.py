"""A teacher that was trained on images prepared in another way than the model's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.data import PreprocessLike


def fit_inputs(teacher: nn.Module, given: PreprocessLike, own: PreprocessLike) -> None:
    """Lets a model take images that were prepared for another one, in place.

    From then on each forward brings its images (B, C, H, W) from the other's mean, standard
    deviation and size to its own. Where these are the same, nothing is changed.

    Args:
        teacher: gets a hook before its forward; its weights and state dict stay as they are.
        given: how the images will be prepared.
        own: how the teacher expects them.
    """
    same_colours = tuple(given.mean) == tuple(own.mean) and tuple(given.std) == tuple(own.std)
    if same_colours and given.size == own.size:
        return
    given_mean, given_std, mean, std = (
        torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)
        for values in (given.mean, given.std, own.mean, own.std)
    )
    scale, shift = (given_std / std).float(), ((given_mean - mean) / std).float()
    on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def prepare(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        images: Tensor = args[0]
        if images.device not in on_device:
            on_device[images.device] = scale.to(images.device), shift.to(images.device)
        by, plus = on_device[images.device]
        images = torch.addcmul(plus.to(images.dtype), images, by.to(images.dtype))
        if given.size != own.size:
            sides = (own.size, own.size)
            images = F.interpolate(images, sides, mode="bicubic", antialias=True)
        return (images, *args[1:])

    teacher.register_forward_pre_hook(prepare)
