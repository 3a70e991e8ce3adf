"""Images that are drawn at random, for models without photos at hand: `--calib random`."""

from __future__ import annotations

from io import BytesIO
from typing import BinaryIO

from tiedconv.data.drawn_images import random_shapes
from tiedconv.data.images import Images
from tiedconv.data.layouts._base import Layout, Parts

_NAME = "random"
_COUNT = 10_000
_SIDE = 256
"""Pixels a side, before an image is brought to the model's size."""


class _Drawn:
    """Images by their numbers, each of which is the seed of one."""

    def name(self, at: int) -> str:
        return f"{_NAME} image {at}"

    def open(self, at: int) -> BinaryIO:
        from PIL import Image

        pixels = random_shapes(1, (_SIDE, _SIDE), seed=at)[0]
        image = Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
        encoded = BytesIO()
        image.save(encoded, "BMP")  # the quickest to write and to read
        encoded.seek(0)
        return encoded


class RandomShapes(Layout):
    """Shapes at random, without labels; a folder of that name is `./random`."""

    name = "random"
    labels_from = "classes, as they are shapes"
    expected = "Expected a folder of images in class folders"

    stands_in = True

    def takes(self, spec: str) -> bool:
        return spec == _NAME

    def parts(self, spec: str, *, labels: bool) -> Parts:
        return Parts(whole=lambda: Images.all_of(_Drawn(), _COUNT, None, ()))


LAYOUT = RandomShapes()
