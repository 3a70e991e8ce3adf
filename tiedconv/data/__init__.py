"""Images in, seeded batches out: layouts, transforms, data sets and loaders.

Nothing here knows of models or plans. Neither torchvision nor Pillow is imported before an
image is decoded.
"""

from __future__ import annotations

from tiedconv.data.annotations import Objects
from tiedconv.data.datasets import Broken, ImageList, Sample, TensorList, first_readable
from tiedconv.data.drawn_images import random_shapes
from tiedconv.data.images import Images, Store
from tiedconv.data.loading import Batch, Loader, SampleKey, default_workers
from tiedconv.data.normalize import Normalization, as_uint8
from tiedconv.data.open import Labels, Split, open_images, open_split, open_unlabelled
from tiedconv.data.subset import Subset
from tiedconv.data.transforms import (
    AUGMENTS,
    ImageTransform,
    PreprocessLike,
    eval_transform,
    train_transform,
)

__all__ = [
    "AUGMENTS",
    "Batch",
    "Broken",
    "ImageList",
    "ImageTransform",
    "Images",
    "Labels",
    "Loader",
    "Normalization",
    "Objects",
    "PreprocessLike",
    "Sample",
    "SampleKey",
    "Split",
    "Store",
    "Subset",
    "TensorList",
    "as_uint8",
    "default_workers",
    "eval_transform",
    "first_readable",
    "open_images",
    "open_split",
    "open_unlabelled",
    "random_shapes",
    "train_transform",
]
