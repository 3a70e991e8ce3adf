"""From a decoded image to the tensor a model takes.

A transform is a frozen record of what to do. The torchvision operations are built in the
process that uses them: so a transform is cheap to send to a worker, and torchvision is only
ever imported behind its guard.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tiedconv.data.normalize import Normalization
from tiedconv.errors import UserError

AUGMENTS = ("none", "flip", "shift", "crop", "randaugment", "trivialaugment")
"""What training may do to an image, from nothing to much."""

NEED_FILES = ("randaugment", "trivialaugment")
"""Those that work on decoded image files, not on tensors in memory."""

ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
"""Ranges of random erasing: fraction of the image, height by width of the patch."""

SMALL = 64
"""Up to this size in pixels an image is shifted; a larger one is cropped and resized."""

_MIRRORED_AND_MOVED = ("crop", "randaugment", "trivialaugment")


class PreprocessLike(Protocol):
    """What a model expects of its images; `size` and `resize` in pixels.

    `resize` is the length of the shorter side before the centre crop of `size`; None stretches
    the whole image to `size` x `size`. `mean` and `std` are for values between 0 and 1.
    """

    @property
    def size(self) -> int: ...
    @property
    def resize(self) -> int | None: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def interpolation(self) -> str: ...


def check_augment(augment: str) -> None:
    """Raises UserError for an unknown augmentation."""
    if augment not in AUGMENTS:
        raise UserError(
            f"Unknown augmentation {augment!r}",
            hint=f"Choose one of {', '.join(AUGMENTS)}",
            code="unknown-augmentation",
        )


def check_erasing(erasing: float) -> None:
    """Raises UserError unless a probability of erasing is one."""
    if not 0 <= erasing <= 1:
        raise UserError(
            f"The probability of random erasing is {erasing}",
            hint="Choose 0 or more and at most 1",
            code="invalid-erasing",
        )


@dataclass(frozen=True)
class ImageTransform:
    """A PIL image in RGB to a normalised float32 tensor of shape (3, size, size).

    An image that already has the model's size is not resized. A shift fills the border with the
    image reflected: a black border is out of distribution for most models (it moved the batch norms
    of a ResNet so far that it lost two points of its 82 %). Random choices come from torch's global
    generator, which the loader seeds for each sample. Without `normalise` the tensor is uint8.
    """

    size: int
    resize: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    augment: str = "none"
    erasing: float = 0.0
    normalise: bool = True

    def __post_init__(self) -> None:
        check_augment(self.augment)
        check_erasing(self.erasing)

    def __call__(self, image: Any) -> Tensor:
        fit, augment, erase = _operations(self)
        if image.size != (self.size, self.size) or self._crops_freely:
            image = fit(image)
        # Not torchvision's ToDtype and Normalize: for small images their checks would take longer
        # than the decoding.
        values = np.array(augment(image))
        if values.ndim == 2:  # grey
            values = values[..., None]
        pixels = erase(torch.from_numpy(values).permute(2, 0, 1))
        return self.normalisation(pixels) if self.normalise else pixels

    @property
    def normalisation(self) -> Normalization:
        """The normalization of the pixels."""
        return Normalization(self.mean, self.std)

    def as_uint8(self) -> ImageTransform:
        """The same without normalising."""
        return replace(self, normalise=False)

    @property
    def _crops_freely(self) -> bool:
        return self.augment in _MIRRORED_AND_MOVED and self.size > SMALL


def eval_transform(preprocess: PreprocessLike) -> ImageTransform:
    """The transform to evaluate with: resize, centre crop, normalise."""
    return train_transform(preprocess, "none")


def train_transform(
    preprocess: PreprocessLike, augment: str = "crop", erasing: float = 0.0
) -> ImageTransform:
    """The transform to train with.

    Args:
        preprocess: what the model expects.
        augment: "none"; "flip" mirrors half of the images; "shift" moves them by up to an
            eighth of the size, for digits and letters, which a mirror would change; "crop"
            mirrors, and shifts small images (up to 64 pixels) or cuts 35 to 100 % out of larger
            ones; "randaugment" adds RandAugment to "crop" (Cubuk et al., arXiv 1909.13719);
            "trivialaugment" adds one operation of random kind and strength to "crop", with
            nothing to tune (TrivialAugmentWide, Müller and Hutter, arXiv 2103.10158).
        erasing: probability that a random rectangle, 2 to 33 % of the image, is replaced by the
            mean colour (Zhong et al., arXiv 1708.04896).

    Raises:
        UserError: an unknown augmentation, or an `erasing` outside 0 to 1.
    """
    return ImageTransform(
        preprocess.size,
        preprocess.resize,
        tuple(preprocess.mean),
        tuple(preprocess.std),
        preprocess.interpolation,
        augment,
        erasing,
    )


@functools.lru_cache(maxsize=16)
def _operations(spec: ImageTransform) -> tuple[Any, Any, Any]:
    """(brings an image to size, augments it, erases of its pixels), built once per process."""
    from tiedconv.sources.torchvision_compat import import_torchvision

    import_torchvision()
    from torchvision.transforms import v2

    mode = _interpolation(spec.interpolation)
    size = spec.size
    if spec._crops_freely:
        fit = v2.RandomResizedCrop(size, scale=(0.35, 1.0), interpolation=mode, antialias=True)
    elif spec.resize is None:
        fit = v2.Resize((size, size), interpolation=mode, antialias=True)
    else:
        resize = v2.Resize(spec.resize, interpolation=mode, antialias=True)
        fit = v2.Compose([resize, v2.CenterCrop(size)])
    steps: list[Any] = []
    if spec.augment in ("shift", *_MIRRORED_AND_MOVED) and not spec._crops_freely:
        steps.append(v2.RandomCrop(size, padding=max(1, size // 8), padding_mode="reflect"))
    if spec.augment in ("flip", *_MIRRORED_AND_MOVED):
        steps.append(v2.RandomHorizontalFlip())
    if spec.augment == "randaugment":
        steps.append(v2.RandAugment(interpolation=mode))
    if spec.augment == "trivialaugment":
        steps.append(v2.TrivialAugmentWide(interpolation=mode))
    # Of the pixels, so that images travel as bytes; the mean colour is theirs to half a step.
    mean = [round(255 * value) for value in spec.mean]
    erase = v2.RandomErasing(spec.erasing, ERASED_AREA, ERASED_RATIO, mean)
    return fit, v2.Compose(steps) if steps else _unchanged, erase if spec.erasing else _unchanged


def _unchanged(image: Any) -> Any:
    return image


def _interpolation(name: str) -> Any:
    from torchvision.transforms import InterpolationMode

    try:
        return InterpolationMode[name.upper()]
    except KeyError:
        raise UserError(
            f"Unknown interpolation {name!r}",
            hint="Choose bilinear or bicubic",
            code="unknown-interpolation",
        ) from None
