"""Evaluation of a classifier."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Batch, Loader
from tiedconv.data.images import are_indices
from tiedconv.errors import DataError, RunError
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.device import Placement, pick_device
from tiedconv.training.distributed import ALONE, DistContext, PaddingImage
from tiedconv.training.events import EvalStep, OnEvent, Skipped, ignore
from tiedconv.training.losses import rows_of
from tiedconv.training.metrics import ACCURACY, Metrics, metric_names

EVENT_SECONDS = 0.1
"""The shortest time between two progress events."""


@dataclass(frozen=True)
class EvalResult:
    """Metrics over all images that could be read.

    Attributes:
        metrics: fractions from 0 to 1 by name. `top1`: images whose label has the largest logit;
            `top5`: whose label is among the five largest (all, if fewer); `agreement`: whose
            class is the teacher's; `ap`, `ap50`, ...: COCO's average precision.
        loss: mean cross-entropy; of a detector 0, or not finite if an output isn't.
        images: number of images evaluated.
        outputs: number of the model's classes.
        skipped: number of images that could not be read.
        example_of_skipped: the first of them, or None.
        seconds: time taken.
    """

    metrics: Metrics
    loss: float
    images: int
    outputs: int
    skipped: int
    example_of_skipped: str | None
    seconds: float

    @classmethod
    def ended(
        cls,
        start: float,
        metrics: Metrics,
        loss: float,
        images: int,
        outputs: int,
        broken: Sequence[str],
        skipped: int | None = None,
    ) -> EvalResult:
        """The result of an evaluation that began at `start`, by `time.perf_counter`, and is over.

        `skipped` counts the images that all processes could not read; those of `broken` if None.
        """
        count = len(broken) if skipped is None else skipped
        example = broken[0] if broken else None
        seconds = time.perf_counter() - start
        return cls(metrics, loss, images, outputs, count, example, seconds)

    @property
    def top1(self) -> float:
        """Top-1 accuracy; NaN where other metrics were measured."""
        return self.metrics.get("top1", math.nan)

    @property
    def top5(self) -> float:
        """Top-5 accuracy; likewise."""
        return self.metrics.get("top5", math.nan)


def evaluate_model(
    model: nn.Module,
    data: Dataset[Any],
    *,
    batch_size: int = 64,
    device: str | torch.device = "auto",
    amp: str = "off",
    channels_last: str = "auto",
    workers: int | None = None,
    on_event: OnEvent | None = None,
) -> EvalResult:
    """Evaluates a model on labelled images. The model is moved to the device.

    Args:
        model: returns logits (B, classes) in any form that `logits_of` knows.
        data: a data set of (image, label), such as an `ImageList` with an `eval_transform`.
        batch_size: images at a time.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        amp: "off" computes as the model is; "auto" in bfloat16 on CUDA.
        channels_last: "auto" for convolutional networks, "on" or "off".
        workers: processes that read images; None chooses.
        on_event: called with progress.

    Raises:
        DataError: no image could be read, or labels that the model has no output for.
        UserError: a device that is not there.
    """
    placement = Placement.choose(model, pick_device(device), amp, channels_last)
    placement.place(model)
    loader = Loader(data, batch_size, workers=workers, device=placement.device)
    on_event = on_event or ignore
    try:
        result = scorer_of(data)(model, loader, placement, on_event, ALONE)
    finally:
        loader.close()
        placement.release(model)
    if result.example_of_skipped is not None:
        on_event(Skipped(result.skipped, result.example_of_skipped))
    return result


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Loader,
    placement: Placement,
    on_event: OnEvent = ignore,
    classes: int | None = None,
    processes: DistContext = ALONE,
    names: Sequence[str] = ACCURACY,
) -> EvalResult:
    """Evaluates a model that is on its device already; see `evaluate_model`.

    `classes` is the number of classes of the data, where it is known; `names` are those of the
    fractions of top-1 and (if there are two) top-5 hits. Each process reads a part of the images;
    all return the metrics of the whole.
    """
    start = time.perf_counter()
    # The counts of top-1 and top-5 hits and the summed loss stay on the device until the end.
    sums = torch.zeros(3, dtype=torch.float64 if placement.device.type != "mps" else None)
    sums = sums.to(placement.device)
    images = outputs = 0
    broken: list[str] = []
    for batch, output in answers(model, loader, placement, broken, on_event, processes):
        logits = rows_of(output)
        outputs = logits.shape[-1]
        check_labels(batch.labels, outputs, classes)
        sums += _sums(logits, batch.labels.to(placement.device, non_blocking=True))
        images += len(batch.images)
    processes.sum(sums)
    counts = torch.tensor([images, len(broken)], device=placement.device)
    images, skipped = processes.sum(counts).tolist()
    require_some(images, broken)
    *hits, loss = (sums / images).tolist()
    if math.isnan(loss):
        raise RunError(
            "The model answers NaN or infinite numbers",
            "Such answers have no accuracy",
            "Check its weights, and the mean and standard deviation of its images",
            code="outputs-not-finite",
        )
    metrics = dict(zip(names, hits, strict=False))
    return EvalResult.ended(start, metrics, loss, images, outputs, broken, skipped)


def answers(
    model: nn.Module,
    loader: Loader,
    placement: Placement,
    broken: list[str],
    on_event: OnEvent = ignore,
    processes: DistContext = ALONE,
) -> Iterator[tuple[Batch, Any]]:
    """Batches with what the model, in evaluation mode, gives for them.

    Of several processes each gives its own part, and calls the model as often as the others.

    Args:
        model: on its device already.
        loader: of the images.
        placement: where and how to compute.
        broken: the names of images that can't be read are added to it.
        on_event: called with progress.
        processes: that evaluate together.
    """
    start = reported = time.perf_counter()
    images = 0
    with modes_kept(model):
        model.eval()
        spare = PaddingImage(processes)
        for batch in loader.epoch():
            broken += batch.broken
            some = spare.instead_of_none(batch.images)
            if some is None:
                continue
            with placement.autocast():
                shown = placement.images(some)
                output = model(shown) if images else checked_forward(model, shown)
            if not len(batch.images):
                continue
            images += len(batch.images)
            yield batch, output
            now = time.perf_counter()
            if now - reported >= EVENT_SECONDS:
                reported = now
                share = images * processes.count  # about, as the others are not asked
                on_event(EvalStep(share, loader.images, share / (now - start)))


Scorer = Callable[[nn.Module, Loader, Placement, OnEvent, DistContext], EvalResult]
"""What evaluates a model that is on its device already."""


def scorer_of(data: Dataset[Any]) -> Scorer:
    """How a model is evaluated on a data set: as its own task has it, or as a classifier."""
    task = getattr(data, "task", None)
    if task is not None:
        own: Scorer = task.score
        return own
    classes, names = class_count(data), metric_names(data)

    def scorer(
        model: nn.Module,
        loader: Loader,
        placement: Placement,
        on_event: OnEvent,
        processes: DistContext,
    ) -> EvalResult:
        return score(model, loader, placement, on_event, classes, processes, names)

    return scorer


def class_count(data: Dataset[Any]) -> int | None:
    """The number of classes of a data set that names them; None where labels are indices."""
    classes: Sequence[str] | None = getattr(data, "classes", None)
    if not classes or are_indices(classes):
        return None
    return len(classes)


def check_labels(labels: Tensor, outputs: int, classes: int | None = None) -> None:
    """Refuse data whose classes are not those of a model with so many outputs.

    Raises:
        DataError: there are fewer classes (`classes-unmatched`), or more (`classes-mismatch`).
    """
    if classes and classes < outputs:
        raise DataError(
            f"The data have {classes} classes and the model {outputs} outputs, and the names of "
            "the model's classes are not known",
            "Which output belongs to which class would be a guess",
            "Say it with --class-map FILE (one name for each output), --class-map imagenet, or "
            "--class-map position if the first outputs are meant; a class without images needs an "
            "empty folder",
            code="classes-unmatched",
        )
    needed = max(classes or 0, int(labels.max()) + 1)
    if needed > outputs:
        raise DataError(
            f"The data have {needed} classes but the model has {outputs} outputs",
            "Some labels could never be predicted",
            "Use the data that the model was made for, or a model with that many outputs",
            code="classes-mismatch",
        )


def require_some(images: int, broken: Iterable[str]) -> None:
    """Raises DataError when no image at all could be read."""
    if not images:
        example = next(iter(broken), "none")
        raise DataError(
            f"None of the images could be read, the first is {example}",
            hint="Check that the files are images and can be read; --strict tells why",
            code="no-readable-image",
        )


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    """(top-1 hits, top-5 hits, summed cross-entropy) of one batch."""
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = best == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss])
