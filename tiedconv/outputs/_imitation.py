"""Training towards a teacher's outputs of any kind, without labels.

A data set carries the task (`Imitated`), as a detector's does its own: the loss is the distance
that the kind of output has, the metric how far the model says the same as its teacher.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Broken, Loader, Normalization, as_uint8
from tiedconv.outputs._base import OutputKind
from tiedconv.runtime.call_hooks import one_seed
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.distributed import ALONE, DistContext
from tiedconv.training.evaluation import EvalResult, answers, require_some
from tiedconv.training.events import OnEvent, ignore
from tiedconv.training.losses import feature_loss
from tiedconv.training.metrics import AGREEMENT, SIMILARITY
from tiedconv.training.mixup import Mix
from tiedconv.training.objective import Outcome, distilled_blocks, outputs_of
from tiedconv.training.option_checks import check_unused

USUAL = {"distillation": ("soft",), "temperature": (1.0, 2.0), "label_smoothing": (0.0,)}
"""Options for class labels and their logits: the values that change nothing here."""


class Imitation:
    """The task of giving the outputs that a teacher gives.

    Args:
        kind: of the outputs.
        teacher: what they are compared with in an evaluation; in training it is given again.
    """

    def __init__(self, kind: OutputKind, teacher: nn.Module) -> None:
        self.kind, self.teacher = kind, teacher
        self.metrics = AGREEMENT if kind.counts else SIMILARITY

    def objective(
        self,
        config: TrainConfig,
        forward: Callable[..., Any],
        student: nn.Module,
        teacher: nn.Module | None,
        placement: Placement,
    ) -> ImitationObjective:
        """The loss of a training; arguments as for `training.Objective`."""
        known = self.teacher if teacher is None else teacher
        return ImitationObjective(self.kind, config, forward, student, known, placement)

    @torch.no_grad()
    def score(
        self,
        model: nn.Module,
        loader: Loader,
        placement: Placement,
        on_event: OnEvent = ignore,
        processes: DistContext = ALONE,
    ) -> EvalResult:
        """How far a model says the same as the teacher, mean over the images.

        Args:
            model: on its device already, as the teacher is.
            loader: of an `Imitated`.
            placement: where and how to compute.
            on_event: called with progress.
            processes: that evaluate together.

        Returns:
            `loss` is the mean distance to the teacher.

        Raises:
            DataError: no image could be read.
            UserError: a teacher with outputs of other shapes (`teacher-mismatch`).
        """
        start = time.perf_counter()
        sums, broken = torch.zeros(3, dtype=torch.float64), list[str]()
        same_seed = Seeded(model)
        for batch, output in answers(same_seed, loader, placement, broken, on_event, processes):
            shown = placement.images(batch.images)
            with placement.autocast(), one_seed(shown, 0):
                answer = self.teacher(shown)
            count = len(batch.images)
            apart = self.kind.distance(output, answer, model).double().cpu() * count  # or raises
            same = self.kind.agreement(output, answer, model).double().sum().cpu()
            sums += torch.stack([same, apart, torch.tensor(float(count), dtype=torch.float64)])
        parts = processes.gathered((sums.tolist(), broken))
        same_, apart_, images = (sum(part[0][i] for part in parts) for i in range(3))
        broken = [name for _, theirs in parts for name in theirs]
        require_some(int(images), broken)
        metrics = {self.metrics[0]: same_ / images}
        return EvalResult.ended(start, metrics, apart_ / images, int(images), 0, broken)


class ImitationObjective:
    """The distance to a teacher's outputs, and to those of its blocks where that is asked for.

    Args:
        kind: of the outputs.
        config, forward, student, teacher, placement: as for `training.Objective`.

    Raises:
        UserError: an option that is for class labels (`option-for-classifiers`), or a teacher with
            other blocks where features are asked for.
    """

    def __init__(
        self,
        kind: OutputKind,
        config: TrainConfig,
        forward: Callable[..., Any],
        student: nn.Module,
        teacher: nn.Module,
        placement: Placement,
    ) -> None:
        check_unused(config, USUAL, "class logits", "The distance of other outputs")
        self.kind, self.config = kind, config
        self._forward, self._student, self._teacher = forward, student, teacher
        self._placement = placement
        self._blocks = distilled_blocks(config, student, teacher)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> Outcome:
        """The loss of a batch; `labels` are not used, `seed` decides how images are mixed."""
        shown = self._placement.images(images)
        if self.config.mixup > 0 or self.config.cutmix > 0:
            mix = Mix.draw(self.config.mixup, self.config.cutmix, images.shape, seed)
            shown = self._placement.images(mix.images(shown))
        with (
            outputs_of(self._student, self._blocks) as own,
            self._placement.autocast(),
            one_seed(shown, seed),
        ):
            output = self._forward(shown)
        with (
            torch.no_grad(),
            outputs_of(self._teacher, self._blocks) as aims,
            self._placement.autocast(),
            one_seed(shown, seed),
        ):
            answer = self._teacher(shown)
        loss = self.kind.distance(output, answer, self._student)
        if aims:
            loss = loss + self.config.features * feature_loss(own, aims)
        return Outcome(loss, loss.detach())


class Seeded(nn.Module):
    """A model whose random numbers are the same in each call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """What the model returns."""
        with one_seed(images, 0):
            return self.model(images)


class Imitated(Dataset[Any]):
    """Images without labels, and the task of answering as a teacher does.

    Args:
        data: gives (image, anything), or `Broken`, for each index.
        task: what to do with them.
    """

    in_memory = False

    def __init__(self, data: Dataset[Any], task: Imitation) -> None:
        self.data, self.task = data, task

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def as_uint8(self) -> tuple[Imitated, Normalization] | None:
        """The same with images as uint8, where the data set within can give them."""
        data, normalisation = as_uint8(self.data)
        return (Imitated(data, self.task), normalisation) if normalisation else None

    def __getitem__(self, index: int) -> Any:
        sample = self.data[index]
        return sample if isinstance(sample, Broken) else (sample[0], index)
