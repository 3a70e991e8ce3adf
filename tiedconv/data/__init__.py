"""Images in, seeded batches out: folders, transforms, data sets and loaders.

Nothing here knows of models or plans. Neither torchvision nor Pillow is imported before an
image is decoded.
"""

from __future__ import annotations

from tiedconv.data.folders import Images, Split, find_images, find_split, find_unlabelled
from tiedconv.data.lists import Broken, ImageList, Sample, TensorList
from tiedconv.data.loading import Batch, Loader, Ticket, default_workers
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
    "Loader",
    "PreprocessLike",
    "Sample",
    "Split",
    "TensorList",
    "Ticket",
    "default_workers",
    "eval_transform",
    "find_images",
    "find_split",
    "find_unlabelled",
    "train_transform",
]
