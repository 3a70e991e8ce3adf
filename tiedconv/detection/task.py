"""Object detection as a task: what training and evaluation do differently."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tiedconv.data import Images, Loader, Objects
from tiedconv.detection.classes import class_map
from tiedconv.detection.objective import DetectionObjective
from tiedconv.detection.outputs import Detections, detections_of, parts_of
from tiedconv.detection.scoring import PRECISION, average_precision
from tiedconv.errors import DataError, UserError
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.distributed import ALONE, DistContext
from tiedconv.training.evaluation import EvalResult, answers, require_some
from tiedconv.training.events import OnEvent, ignore
from tiedconv.training.option_checks import check_unused

TASKS = ("auto", "classification", "detection")


def detects(task: str, images: Images) -> bool:
    """Whether the task is detection: as the user asks, or by the data.

    Raises:
        UserError: there is no such task.
        DataError: the data are not for it.
    """
    if task not in TASKS:
        raise UserError(
            f"Unknown task {task!r}", hint=f"Choose {', '.join(TASKS)}", code="unknown-task"
        )
    found = images.objects is not None
    if task == "classification" and found:
        raise DataError(
            "The data have boxes, and no class for a whole image",
            "A classifier can't be evaluated or trained with them",
            "Give class folders, or leave --task out",
            code="task-mismatch",
        )
    return found if task == "auto" else task == "detection"


def for_detector(config: TrainConfig) -> TrainConfig:
    """The options as a detector can take them: "crop" only mirrors, and norms stay as they are.

    Raises:
        UserError: an option that boxes don't go with.
    """
    odd = {
        "augment": config.augment not in ("none", "flip", "crop"),
        "mixup": config.mixup > 0,
        "cutmix": config.cutmix > 0,
        "erasing": config.erasing > 0,
    }
    for option in (name for name, set_ in odd.items() if set_):
        raise UserError(
            f"{option}={getattr(config, option)} is for classifiers",
            "A detector's boxes would not follow it",
            f"Leave --{option} out; --augment flip mirrors images and boxes",
            code="option-for-classifiers",
        )
    usual = {"distillation": ("soft",), "label_smoothing": (0.0,)}
    check_unused(config, usual, "classifiers", "A detector's loss")
    augment = "none" if config.augment == "none" else "flip"
    return replace(config, augment=augment, bn_recalibrate=0)


class Detection:
    """The task of finding objects; data sets carry it as their `task`.

    Args:
        objects: of the data.
    """

    metrics = PRECISION

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def objective(
        self,
        config: TrainConfig,
        forward: Callable[..., Any],
        student: nn.Module,
        teacher: nn.Module | None,
        placement: Placement,
    ) -> DetectionObjective:
        """The loss of a training; arguments as for `training.Objective`."""
        return DetectionObjective(config, forward, student, teacher, placement, self.objects)

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: Loader,
        placement: Placement,
        on_event: OnEvent = ignore,
        processes: DistContext = ALONE,
    ) -> EvalResult:
        """The model's average precision.

        Args:
            model: on its device already.
            loader: of a `DetectionList`.
            placement: where and how to compute.
            on_event: called with progress.
            processes: that evaluate together.

        Returns:
            `metrics` are those of `average_precision`; `loss` is 0, or not finite if an output
            isn't.

        Raises:
            DataError: no image could be read, or classes that the model doesn't know.
        """
        start = time.perf_counter()
        found: dict[int, Detections] = {}
        broken: list[str] = []
        finite = torch.zeros((), device=placement.device)
        outputs = 0
        for batch, output in answers(model, loader, placement, broken, on_event, processes):
            logits, boxes = parts_of(output)
            outputs = logits.shape[-1]
            finite = finite + 0 * (logits.sum() + boxes.sum())
            found |= dict(zip(batch.labels.tolist(), detections_of(output, model), strict=True))
        parts = processes.gathered((found, broken))
        found = {i: each for theirs, _ in parts for i, each in theirs.items()}
        broken = [name for _, theirs in parts for name in theirs]
        require_some(len(found), broken)
        classes = class_map(model, self.objects, outputs)
        metrics = average_precision(found, self.objects, classes)
        return EvalResult.ended(start, metrics, float(finite), len(found), outputs, broken)
