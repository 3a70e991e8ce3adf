"""A vote of the nearest training images, for models that give features."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import ImageList, Images, Loader
from tiedconv.errors import DataError
from tiedconv.tasks._base import EvaluationTask, Given, features_of, normalised
from tiedconv.training.device import Placement
from tiedconv.training.distributed import ALONE, DistContext
from tiedconv.training.evaluation import EvalResult, answers, require_some
from tiedconv.training.events import OnEvent, ignore

_NEIGHBOURS = 20
_AT_ONCE = 1024
"""Images that vote together: their cosines to all training images are held."""

_TEMPERATURE = 0.07
"""Of the weight of a vote, `exp(cosine / 0.07)` (Wu et al., arXiv 1805.01978; DINO's protocol)."""


class VotingList(ImageList):
    """Labelled images, and the task of guessing their class from training images.

    Args:
        given: what is evaluated.
    """

    def __init__(self, given: Given) -> None:
        shown = given.listed(given.images)
        super().__init__(
            shown.images, shown.transform, strict=shown.strict, channels=shown.channels,
            exif=shown.exif,
        )  # fmt: skip
        bank = given.train
        if bank is None or bank.labels is None or bank.classes != given.images.classes:
            raise DataError(
                "The training images have no labels, or other classes",
                "Their vote would mean nothing",
                "Give a folder with train/ and val/, with the same class folders in both",
                code="classes-differ",
            )
        self.task = Vote(given.listed(bank), given.batch_size, given.workers, len(bank.classes))


class Vote:
    """Top-1 of a vote of the 20 nearest training images by the cosine of features.

    Args:
        bank: the training images.
        batch_size: of these at a time.
        workers: processes that read them.
        classes: how many there are.
    """

    metrics = ("vote",)

    def __init__(self, bank: ImageList, batch_size: int, workers: int | None, classes: int) -> None:
        self.bank, self.batch_size, self.workers = bank, batch_size, workers
        self.classes = classes

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: Loader,
        placement: Placement,
        on_event: OnEvent = ignore,
        processes: DistContext = ALONE,
    ) -> EvalResult:
        """The share of images whose class wins; arguments as for `training.evaluation.score`.

        Raises:
            DataError: no image could be read.
            UserError: the model's features are not known (`features-unknown`).
        """
        start, broken = time.perf_counter(), list[str]()
        with closing(Loader(self.bank, self.batch_size, workers=self.workers,
                            device=placement.device)) as banked:  # fmt: skip
            known, labels = _features(model, banked, placement, broken, on_event, ALONE)
        found, truth = _features(model, loader, placement, broken, on_event, processes)
        right = sum(
            int((self._winners(part, known, labels) == classes).sum())
            for part, classes in zip(
                torch.split(found, _AT_ONCE), torch.split(truth, _AT_ONCE), strict=True
            )
        )
        parts = processes.gathered((right, len(truth)))
        right = sum(count for count, _ in parts)
        images = sum(count for _, count in parts)
        require_some(images, broken)
        metrics = {"vote": right / images}
        return EvalResult.ended(start, metrics, 0.0, images, self.classes, broken)

    def _winners(self, found: Tensor, known: Tensor, labels: Tensor) -> Tensor:
        near, where = (found @ known.T).topk(min(_NEIGHBOURS, len(known)))
        votes = torch.zeros(len(found), self.classes)
        return votes.scatter_add_(1, labels[where], (near / _TEMPERATURE).exp()).argmax(1)


def _features(
    model: nn.Module,
    loader: Loader,
    placement: Placement,
    broken: list[str],
    on_event: OnEvent,
    processes: DistContext,
) -> tuple[Tensor, Tensor]:
    """Features `(images, width)` of length 1 and labels, on the CPU."""
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    for batch, output in answers(model, loader, placement, broken, on_event, processes):
        rows.append(normalised(features_of(output)).cpu())
        labels.append(batch.labels)
    require_some(len(rows), broken)
    return torch.cat(rows), torch.cat(labels)


class Neighbours(EvaluationTask):
    """How well the features of a model tell classes apart, without a classifier."""

    name = "neighbours"
    needs = "class folders, in train/ and in val/ or test/"
    columns = {"vote": "vote of the nearest"}  # noqa: RUF012
    by_default = False
    with_train = True
    by_outputs = False

    def fits(self, images: Images) -> bool:
        return images.labels is not None

    def data(self, given: Given) -> Dataset[Any]:
        return VotingList(given)


TASK = Neighbours()
