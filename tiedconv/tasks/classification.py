"""One class for each image."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from tiedconv.data import Images
from tiedconv.tasks._base import EvaluationTask, Given


class Classification(EvaluationTask):
    """Top-1 and top-5 accuracy."""

    name = "classification"
    needs = "a class for each image, such as class folders"
    columns = {"top1": "top-1", "top5": "top-5"}  # noqa: RUF012
    last = True

    def fits(self, images: Images) -> bool:
        return images.objects is None and images.masks is None

    def data(self, given: Given) -> Dataset[Any]:
        return given.listed(given.images)


TASK = Classification()
