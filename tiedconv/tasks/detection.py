"""Boxes around the objects of an image."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from tiedconv.data import Images
from tiedconv.detection import DetectionList
from tiedconv.tasks._base import EvaluationTask, Given


class Detection(EvaluationTask):
    """Average precision as COCO defines it."""

    name = "detection"
    needs = "boxes, in COCO's form"
    columns = {  # noqa: RUF012
        "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "small", "ap_medium": "medium",
        "ap_large": "large",
    }  # fmt: skip

    def fits(self, images: Images) -> bool:
        return images.objects is not None

    def data(self, given: Given) -> Dataset[Any]:
        return DetectionList(given.images, given.preprocess, strict=given.strict)


TASK = Detection()
