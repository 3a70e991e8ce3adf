"""Images that are drawn at random, for models without photos at hand: `--calib random`.

They are drawn at the size that a model takes: shapes of two pixels are lost when an image is made
smaller, and with them half of what the images are worth.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import BinaryIO

from tiedconv.data.drawn_images import random_shapes
from tiedconv.data.images import Images
from tiedconv.data.layouts._base import Layout, Parts

_SPEC = re.compile(r"random(?::(\d+))?")
_COUNT = 10_000
_SIDE = 224
"""Pixels a side, where nothing else is said."""


class _Drawn:
    """Images by their numbers, each of which is the seed of one."""

    def __init__(self, side: int) -> None:
        self._side = side

    def name(self, at: int) -> str:
        return f"random image {at}"

    def open(self, at: int) -> BinaryIO:
        from PIL import Image

        pixels = random_shapes(1, (self._side, self._side), seed=at)[0]
        image = Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())
        encoded = BytesIO()
        image.save(encoded, "BMP")  # the quickest to write and to read
        encoded.seek(0)
        return encoded


class RandomShapes(Layout):
    """`random`, or `random:SIDE`: shapes, without labels. A folder of that name is `./random`."""

    name = "random"
    labels_from = "classes, as they are shapes"
    expected = "Expected a folder of images in class folders"
    stands_in = True

    def takes(self, spec: str) -> bool:
        found = _SPEC.fullmatch(spec)
        return found is not None and found[1] != "0"

    def parts(self, spec: str, *, labels: bool) -> Parts:
        store = _Drawn(int(spec.partition(":")[2] or _SIDE))
        return Parts(whole=lambda: Images.all_of(store, _COUNT, None, ()))

    def at_size(self, spec: str, side: int) -> str:
        return spec if ":" in spec else f"{spec}:{side}"


LAYOUT = RandomShapes()
