"""A class for each pixel."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from tiedconv.data import ImageList, Images, Loader, eval_transform
from tiedconv.data.annotations import Masks
from tiedconv.errors import DataError, MissingExtra, UserError
from tiedconv.outputs.dense_logits import OUTPUT as DENSE
from tiedconv.outputs.dense_logits import logits_in
from tiedconv.tasks._base import EvaluationTask, Given
from tiedconv.training.device import Placement
from tiedconv.training.distributed import ALONE, DistContext
from tiedconv.training.evaluation import EvalResult, answers, require_some
from tiedconv.training.events import OnEvent, ignore

_NO_CLASS = 255
"""The value in a mask of a pixel that does not count."""


class MaskList(ImageList):
    """Images stretched to the model's size; beside each stands its number among the masks.

    Stretched, not cropped: a mask is of the whole image.
    """

    def __init__(self, given: Given) -> None:
        shown = dataclasses.replace(eval_transform(given.preprocess), resize=None)
        channels, exif = given.preprocess.channel_count(), given.preprocess.exif
        super().__init__(given.images, shown, strict=given.strict, channels=channels, exif=exif)
        assert given.images.masks is not None  # as `fits` found
        self.task = MeanIoU(given.images.masks, given.first_class)

    def label(self, index: int) -> int:
        """The image's number among the masks."""
        return int(self.images.places[index])


class MeanIoU:
    """Intersection over union of predicted and true pixels, mean over the classes that occur.

    Counted over all images together, at the size of each mask, by torchmetrics.

    Args:
        masks: of the data.
        first_class: the value in a mask that means the model's first class; smaller ones, and
            255, do not count.
    """

    metrics = ("miou", "pixel_accuracy")

    def __init__(self, masks: Masks, first_class: int) -> None:
        self.masks, self.first_class = masks, first_class

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: Loader,
        placement: Placement,
        on_event: OnEvent = ignore,
        processes: DistContext = ALONE,
    ) -> EvalResult:
        """The metrics; arguments as for `training.evaluation.score`.

        Raises:
            DataError: no image could be read, or a class that the model has no output for.
            UserError: the model gives no class logits for each pixel (`not-a-segmenter`).
            MissingExtra: torchmetrics is not installed.
        """
        counter, start = _counter(), time.perf_counter()
        counts: Tensor | None = None
        broken: list[str] = []
        images = classes = 0
        for batch, output in answers(model, loader, placement, broken, on_event, processes):
            if not DENSE.matches(output, model):
                raise UserError(
                    "The model gives no class logits for each pixel",
                    "It can't be compared with masks",
                    "Use a semantic segmenter",
                    code="not-a-segmenter",
                )
            logits = logits_in(output)
            classes = logits.shape[1]
            for row, number in zip(logits, batch.labels.tolist(), strict=True):
                truth = self._truth(number, classes)
                whole = F.interpolate(row[None], truth.shape, mode="bilinear", align_corners=False)
                part = counter(
                    whole[0].argmax(0).cpu(), truth, num_classes=classes, ignore_index=_NO_CLASS
                )
                counts = part if counts is None else counts + part
            images += len(batch.images)
        parts = processes.gathered((counts, images, broken))
        broken = [name for _, _, theirs in parts for name in theirs]
        images = sum(count for _, count, _ in parts)
        require_some(images, broken)
        total = torch.stack([part for part, _, _ in parts if part is not None]).sum(0)
        return EvalResult.ended(start, self._metrics(total), 0.0, images, classes, broken)

    def _truth(self, number: int, classes: int) -> Tensor:
        found = torch.from_numpy(self.masks.of(number))
        counts = (found >= self.first_class) & (found != _NO_CLASS)
        truth = torch.where(counts, found - self.first_class, _NO_CLASS)
        most = int(truth[counts].max()) if bool(counts.any()) else 0
        if most >= classes:
            raise DataError(
                f"The mask {self.masks.paths[number]} has the class {most + self.first_class}, "
                f"and the model has {classes} classes",
                "That class could never be predicted",
                "Where 0 means no class, as in ADE20K, say --first-class 1; else give the data "
                "that the model was made for",
                code="classes-mismatch",
            )
        return truth

    def _metrics(self, total: Tensor) -> dict[str, float]:
        """Of the numbers of pixels `(true class, predicted class)`."""
        total = total.double()
        right, union = total.diagonal(), total.sum(0) + total.sum(1) - total.diagonal()
        there = union > 0
        miou = float((right[there] / union[there]).mean())
        return {"miou": miou, "pixel_accuracy": float(right.sum() / total.sum())}


def _counter() -> Any:
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix
    except ImportError as error:
        raise MissingExtra.of("torchmetrics", "segmentation", "Mean IoU") from error
    return multiclass_confusion_matrix


class Segmentation(EvaluationTask):
    """Mean intersection over union, and the share of pixels that are right."""

    name = "segmentation"
    needs = "a mask for each image"
    columns = {"miou": "mean IoU", "pixel_accuracy": "pixels right"}  # noqa: RUF012

    def fits(self, images: Images) -> bool:
        return images.masks is not None

    def data(self, given: Given) -> Dataset[Any]:
        return MaskList(given)


TASK = Segmentation()
