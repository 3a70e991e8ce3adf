"""Inputs on which a model can be run although nobody gave one: images, tokens, indices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tiedconv.errors import UserError, first_line

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Example = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""An input of a model: one tensor, positional arguments, or keyword arguments."""


def as_arguments(example: Example) -> Arguments:
    """An input of a model as positional and keyword arguments."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def on_device_of(model: nn.Module, example: Example) -> Example:
    """An input, its tensors on the device of a model's parameters."""
    first = next(model.parameters(), None)
    if first is None:
        return example
    moved: Example = pytree.tree_map(
        lambda x: x.to(first.device) if isinstance(x, Tensor) else x, example
    )
    return moved


FRAMES = 16
"""Of a video, where the model does not say how many: torchvision's were trained on so many."""


def require_accepted(model: nn.Module, example: Example, consequence: str) -> Arguments:
    """The arguments of an input, once the model was run on them.

    Args:
        model: run in evaluation mode.
        example: an input, which is brought to the model's device.
        consequence: of its rejection, for the message.

    Raises:
        UserError: the model can't be run on it (`example-rejected`).
    """
    args, kwargs = as_arguments(on_device_of(model, example))
    try:
        with evaluation(model):
            model(*args, **kwargs)
    except Exception as error:  # models reject inputs with any error
        raise UserError(
            f"The model can't be run on the example: {type(error).__name__}: {first_line(error)}",
            consequence,
            "Give a tensor, a tuple of arguments, or a dict of keyword arguments",
            code="example-rejected",
        ) from error
    return args, kwargs


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Within it a model is in evaluation mode, without gradients, its random state its own."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def usual_inputs(model: nn.Module) -> tuple[Iterator[Tensor], ...]:
    """Inputs of usual shapes, by kind: images, videos, sequences of tokens, indices of tokens."""
    return _images(model), _videos(model), _tokens(model), _indices(model)


def video_shapes(model: nn.Module, channels: int, size: tuple[int, int]) -> list[tuple[int, ...]]:
    """Shapes of one video that a model of videos may take; none for a model of anything else.

    A model of transformers says how many frames it takes, and takes them before the channels. One
    of torchvision takes them after; it is known by its 3-D convolutions.

    Args:
        model: any.
        channels: of an image.
        size: height and width.
    """
    frames = getattr(getattr(model, "config", None), "num_frames", None)
    if isinstance(frames, int):
        return [(frames, channels, *size), (channels, frames, *size)]
    if any(isinstance(m, nn.Conv3d) for m in model.modules()):
        return [(channels, FRAMES, *size)]
    return []


def _drawn(model: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(next(model.parameters(), torch.zeros(0)))


def _images(model: nn.Module) -> Iterator[Tensor]:
    kernels = (m for m in model.modules() if isinstance(m, nn.Conv2d))
    channels = next((m.in_channels for m in kernels), 3)
    for height, width in dict.fromkeys(_sizes(model)):
        yield _drawn(model, 1, channels, height, width)


def _videos(model: nn.Module) -> Iterator[Tensor]:
    kernels = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    channels = next((m.in_channels for m in kernels), 3)
    for size in dict.fromkeys(_sizes(model)):
        for shape in video_shapes(model, channels, size):
            yield _drawn(model, 1, *shape)


def _tokens(model: nn.Module) -> Iterator[Tensor]:
    """Sequences as wide as a linear layer or a norm reads, the first few widths of the model."""
    widths = dict.fromkeys(
        m.in_features if isinstance(m, nn.Linear) else m.normalized_shape[-1]
        for m in model.modules()
        if isinstance(m, nn.Linear | nn.LayerNorm)
    )
    for width in list(widths)[:6]:
        yield _drawn(model, 1, 16, width)


def _indices(model: nn.Module) -> Iterator[Tensor]:
    device = next(model.parameters(), torch.zeros(0)).device
    generator = torch.Generator().manual_seed(0)
    yield torch.randint(0, 4, (1, 8), generator=generator).to(device)


def _sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Heights and widths of images: those that attributes and configurations name, usual ones."""
    config = getattr(model, "config", None)
    vision = getattr(config, "vision_config", None)
    named: list[Any] = []
    for holder in (model, getattr(model, "patch_embed", None), config, vision):
        named += [getattr(holder, key, None) for key in ("image_size", "img_size")]
    for record in ("pretrained_cfg", "default_cfg"):
        found = getattr(model, record, None)
        size = found.get("input_size") if isinstance(found, Mapping) else None
        named.append(size[-2:] if size else None)
    for size in [*named, 64, 224, 32, 16]:
        if isinstance(size, int):
            yield size, size
        elif isinstance(size, list | tuple) and len(size) == 2 and all(
            isinstance(n, int) for n in size
        ):  # fmt: skip
            yield size[0], size[1]
