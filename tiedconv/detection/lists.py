"""A data set of images with objects."""

from __future__ import annotations

import dataclasses

from tiedconv.data import ImageList, Images, PreprocessLike, eval_transform
from tiedconv.detection.task import Detection
from tiedconv.errors import DataError, UserError


class DetectionList(ImageList):
    """Images stretched to the model's size; beside each stands its number among the objects.

    Stretched, not cropped: boxes are shares of the image, so they stay what they are.

    Args:
        images: with objects.
        preprocess: what the model expects.
        strict: a broken image raises DataError.

    Raises:
        DataError: the data set has no boxes.
        UserError: the model's images are cropped.
    """

    def __init__(self, images: Images, preprocess: PreprocessLike, *, strict: bool = False) -> None:
        if images.objects is None:
            raise DataError(
                "The data have no boxes",
                "A detector can't be scored or taught with them",
                "Give a folder in COCO's form: instances_train2017.json, instances_val2017.json "
                "and the photos that they list",
                code="no-boxes",
            )
        if preprocess.resize is not None and preprocess.resize != preprocess.size:
            raise UserError(
                f"The model's images are cropped, from {preprocess.resize} to {preprocess.size} "
                "pixels",
                "Objects would be cut off that the score counts",
                "Use --resize 0",
                code="images-cropped",
            )
        shown = dataclasses.replace(eval_transform(preprocess), resize=None)
        super().__init__(images, shown, strict=strict)
        self.task = Detection(images.objects)

    def label(self, index: int) -> int:
        """The image's number among the objects."""
        return int(self.images.places[index])
