"""From an encoded image to a PIL image with a model's channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tiedconv.errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's names for images of so many channels."""

_FULL_SCALES = (255, 4095, 65535)  # of 8, 12 and 16 bits
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height


def decode(
    file: str | Path | BinaryIO,
    channels: int = 3,
    *,
    exif: bool = False,
    size: tuple[int, int] | None = None,
) -> Any:
    """A PIL image.

    Numbers of more than 8 bits are scaled to 0..255: whole numbers from the smallest of 8, 12 and
    16 bits that holds the largest of them (else from their own range), fractions from 0..1, else
    from their own range.

    Args:
        file: what Pillow can open.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA).
        exif: turn the image as its EXIF orientation says, as viewers do.
        size: width and height that it should have, where a data set says so: it is turned if that
            makes it so, whatever `exif` says.

    Raises:
        OSError, ValueError, SyntaxError: it can't be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image: Any = opened
            turn = exif if size is None else _should_turn(image, size)
            if turn:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith(("I", "F")):
                image = Image.fromarray(_to_bytes(np.asarray(image)))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(MODES[channels])
    except Image.DecompressionBombError as error:
        raise OSError(str(error)) from error


def check_channels(channels: int) -> None:
    """Refuse a number of channels that no image file has.

    Raises:
        DataError: not 1, 3 or 4 (`channels-unsupported`).
    """
    if channels not in MODES:
        raise DataError(
            f"The model takes images of {channels} channels",
            "Image files have 1 (grey), 3 (RGB) or 4 (RGBA)",
            "Give a data set of tensors in Python",
            code="channels-unsupported",
        )


def _should_turn(image: Any, size: tuple[int, int]) -> bool:
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    return bool(turned and tuple(image.size) != size and tuple(image.size[::-1]) == size)


def _to_bytes(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of more than 8 bits, scaled to 0..255."""
    numbers = np.nan_to_num(values.astype(np.float64))
    lowest, highest = float(numbers.min(initial=0)), float(numbers.max(initial=0))
    scales = _FULL_SCALES if np.issubdtype(values.dtype, np.integer) else (1, 255)
    full = next((scale for scale in scales if highest <= scale), highest - lowest)
    if lowest < 0 or highest > scales[-1]:
        numbers, full = numbers - lowest, highest - lowest
    scaled: np.ndarray[Any, Any] = np.clip(numbers * (255 / (full or 1)) + 0.5, 0, 255)
    return scaled.astype(np.uint8)
