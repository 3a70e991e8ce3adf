"""Two data sets: encoded images, decoded when read, and images in memory."""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tiedconv.data.decoding import check_channels, decode
from tiedconv.data.images import Images
from tiedconv.data.normalize import Normalization
from tiedconv.data.seeds import uniforms
from tiedconv.data.transforms import (
    ERASED_AREA,
    ERASED_RATIO,
    NEED_FILES,
    ImageTransform,
    check_augment,
    check_erasing,
)
from tiedconv.errors import DataError, UserError

Sample = tuple[Tensor, int]
"""An image of shape (C, H, W) and its label."""


@dataclass(frozen=True)
class Broken:
    """Stands for an image that can't be read, so that one bad file does not end a run.

    `path` is a file's path, or what else the image is called.
    """

    path: str
    reason: str


class ImageList(Dataset[Sample | Broken]):
    """Encoded images, wherever they lie, decoded when they are read.

    Args:
        images: what they are and their labels; without labels, each has the label 0.
        transform: makes a tensor of shape (C, H, W) of a PIL image.
        strict: a broken image raises DataError; otherwise it is given as `Broken`.
        channels: of the decoded images: 1 (grey), 3 (RGB) or 4 (RGBA).
        exif: turn images as their EXIF orientation says. Where boxes say how large an image is,
            it is turned to that size in any case.

    Raises:
        DataError: another number of channels (`channels-unsupported`).
    """

    in_memory = False

    def __init__(
        self,
        images: Images,
        transform: Callable[[Any], Tensor],
        *,
        strict: bool = False,
        channels: int = 3,
        exif: bool = False,
    ) -> None:
        check_channels(channels)
        self.channels, self.exif = channels, exif
        self.images = images
        self.transform = transform
        self.strict = strict

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, in the order of the labels."""
        return self.images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample | Broken:
        try:
            image = self._decoded(index)
        except _DECODING_ERRORS as error:
            name, reason = self.images.name(index), _reason(error)
            if self.strict:
                raise DataError(
                    f"The image {name} can't be read: {reason}",
                    "Strict reading was asked for",
                    "Repair or remove the image, or leave --strict out to skip it",
                    code="image-unreadable",
                ) from error
            return Broken(name, reason)
        return self.transform(image), self.label(index)

    def _decoded(self, index: int) -> Any:
        objects, size = self.images.objects, None
        if objects is not None:
            width, height = objects.sizes[int(self.images.places[index])]
            size = (int(width), int(height))
        return decode(self.images.open(index), self.channels, exif=self.exif, size=size)

    def label(self, index: int) -> int:
        """What stands beside an image; here its class."""
        return self.images.label(index)

    def as_uint8(self) -> tuple[ImageList, Normalization] | None:
        """The same images as uint8, and the normalization that completes the transform.

        None for a transform that is not one of `train_transform`.
        """
        if not isinstance(self.transform, ImageTransform):
            return None
        plain = copy.copy(self)
        plain.transform = self.transform.as_uint8()
        return plain, self.transform.normalisation


# What Pillow raises for files that are cut off, altered or not images. Its error for images that
# are implausibly large is not among them by class, but by name (see `decode`).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
)


def _reason(error: Exception) -> str:
    """An error in one line."""
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image that Pillow can identify"  # Pillow would show a memory address
    text = str(error).strip()
    return text.splitlines()[0] if text else repr(error)


def first_readable(data: Dataset[Any]) -> Any:
    """One of the first images with what stands beside it; None where none can be read."""
    samples = (data[index] for index in range(min(16, len(data))))  # type: ignore[arg-type]
    return next((sample for sample in samples if not isinstance(sample, Broken)), None)


class TensorList(Dataset[Sample]):
    """Images in memory, read a whole batch at a time.

    Args:
        images: shape (N, C, H, W), uint8 (scaled to 0..1 when read) or floating point.
        labels: shape (N,), integers.
        mean: one value per channel to subtract; None leaves the values as they are.
        std: one value per channel to divide by; goes with `mean`.
        augment: "none", "flip", "shift" or "crop", as in `train_transform`; a shift fills the
            border with zeros, before normalising.
        erasing: probability that a random rectangle is set to the mean, as in `train_transform`.

    Raises:
        DataError: shapes that don't belong together.
        UserError: an augmentation that needs image files, or an `erasing` outside 0 to 1.
    """

    in_memory = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | Sequence[int],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: str = "none",
        erasing: float = 0.0,
    ) -> None:
        check_augment(augment)
        check_erasing(erasing)
        if augment in NEED_FILES:
            name = {"randaugment": "RandAugment", "trivialaugment": "TrivialAugment"}[augment]
            raise UserError(
                f"{name} works on image files, not on tensors",
                hint="Choose none, flip, shift or crop",
                code="augmentation-needs-files",
            )
        self.images = images
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        if images.ndim != 4 or self.labels.shape != (len(images),):
            raise DataError(
                f"Images of shape {tuple(images.shape)} with labels of shape "
                f"{tuple(self.labels.shape)} don't belong together",
                hint="Give images of shape (N, C, H, W) and labels of shape (N,)",
                code="shapes-differ",
            )
        self.normalisation = Normalization(
            None if mean is None else tuple(mean), None if std is None else tuple(std)
        )
        self.augment = augment
        self.erasing = erasing
        self._gives_bytes = False

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        images, labels = self.read_batch([index], [index])
        return images[0], int(labels[0])

    def read_batch(self, indices: Sequence[int], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) as float32 and labels (B,); `seeds` decide the augmentation."""
        where = torch.tensor(indices, dtype=torch.int64)
        images = self.images[where]
        if self.augment != "none":
            # Only moves pixels: done to bytes it costs a quarter and gives the same.
            images = _augmented(images, self.augment, uniforms(np.array(seeds, np.uint64), 3))
        if self._gives_bytes:
            return images, self.labels[where]
        images = self._normalised(images)
        if self.erasing:
            # Draws of their own, so that erasing changes no shift and no mirror.
            images = _erased(images, self.erasing, uniforms(np.array(seeds, np.uint64), 8)[:, 3:])
        return images, self.labels[where]

    def as_uint8(self) -> tuple[TensorList, Normalization] | None:
        """The same images as uint8, and the normalization to apply afterwards.

        None if they are floating point already, or normalised images have rectangles erased.
        """
        if self.images.dtype != torch.uint8 or self.erasing:
            return None
        plain = copy.copy(self)
        plain._gives_bytes = True
        return plain, self.normalisation

    def _normalised(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return self.normalisation(images)
        return self.normalisation.to_unit(images.float())


def _augmented(
    images: Tensor, augment: str, draws: np.ndarray[Any, np.dtype[np.float64]]
) -> Tensor:
    """Shifts and mirrors a batch (B, C, H, W); `draws` (B, 3) are uniform in [0, 1)."""
    count, _, height, width = images.shape
    rows = torch.arange(height).expand(count, height)
    columns = torch.arange(width).expand(count, width)
    if augment in ("flip", "crop"):
        mirrored = torch.from_numpy(draws[:, 2] < 0.5)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    if augment in ("shift", "crop"):
        margin = max(1, min(height, width) // 8)
        offsets = torch.from_numpy((draws[:, :2] * (2 * margin + 1)).astype(np.int64)) - margin
        rows = _reflected(rows + offsets[:, :1], height)
        columns = _reflected(columns + offsets[:, 1:], width)
    # Advanced indices around a slice: the result has shape (B, H, W, C).
    batch = torch.arange(count)[:, None, None]
    return images[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _reflected(places: Tensor, size: int) -> Tensor:
    """Places in a row of `size` that is continued by its mirror image; see `ImageTransform`."""
    places = places.abs()
    return torch.where(places < size, places, 2 * (size - 1) - places).clamp(0)


def _erased(
    images: Tensor, probability: float, draws: np.ndarray[Any, np.dtype[np.float64]]
) -> Tensor:
    """Sets a rectangle of some images (B, C, H, W) to 0; `draws` (B, 5) are uniform in [0, 1)."""
    height, width = images.shape[2:]
    chosen, area, ratio, top, left = draws.T
    fraction = ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0])
    shape = np.exp(np.log(ERASED_RATIO[0]) + ratio * np.log(ERASED_RATIO[1] / ERASED_RATIO[0]))
    # A patch longer than the image is cut off at its length.
    rows = np.clip(np.round(np.sqrt(fraction * shape) * height), 1, height)
    columns = np.clip(np.round(np.sqrt(fraction / shape) * width), 1, width)
    inside = _between(np.floor(top * (height - rows + 1)), rows, height)[:, :, None]
    inside = inside & _between(np.floor(left * (width - columns + 1)), columns, width)[:, None, :]
    erased = torch.from_numpy(inside & (chosen < probability)[:, None, None])
    return images.masked_fill(erased[:, None], 0.0)


def _between(start: Any, length: Any, size: int) -> Any:
    """For each image, which of `size` places lie in its interval: shape (B, size)."""
    at = np.arange(size)
    return (at >= start[:, None]) & (at < (start + length)[:, None])
