"""The metric for images without labels: how often a model agrees with its teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Broken, Loader, Normalization, Sample, as_uint8
from tiedconv.errors import DataError
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement, pick_device
from tiedconv.training.evaluation import answers
from tiedconv.training.losses import distillation_loss, logits_of, rows_of
from tiedconv.training.metrics import AGREEMENT


class Relabelled(Dataset[Sample | Broken]):
    """The images of a data set with a teacher's classes as labels.

    Args:
        data: gives (image, anything), or `Broken`, for each index.
        labels: shape (N,); None gives each image its own index.
    """

    in_memory = False
    metrics = AGREEMENT

    def __init__(self, data: Dataset[Any], labels: Tensor | None = None) -> None:
        self.data = data
        self.labels = labels

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def as_uint8(self) -> tuple[Relabelled, Normalization] | None:
        """The same with images as uint8, where the data set within can give them."""
        data, normalisation = as_uint8(self.data)
        return (Relabelled(data, self.labels), normalisation) if normalisation else None

    def __getitem__(self, index: int) -> Sample | Broken:
        sample = self.data[index]
        if isinstance(sample, Broken):
            return sample
        return sample[0], index if self.labels is None else int(self.labels[index])


@torch.no_grad()
def with_teacher_labels(
    data: Dataset[Any],
    teacher: nn.Module,
    student: nn.Module,
    config: TrainConfig,
    device: str | torch.device = "auto",
) -> Relabelled:
    """A data set whose labels are the classes that the teacher predicts.

    It is evaluated by the agreement with the teacher. Both models are moved to the device.

    Args:
        data: images (C, H, W), without augmentation.
        teacher: gives logits (B, classes).
        student: likewise; asked once, so that other classes are reported before any work.
        config: batch size, precision and workers.
        device: as for `train`.

    Raises:
        DataError: no image at all could be read.
        UserError: teacher and student have different classes.
    """
    place = pick_device(device)
    placement = Placement.choose(teacher, place, config.amp, config.channels_last)
    placement.place(teacher)
    size = config.batch_size or 64
    loader = Loader(Relabelled(data), size, workers=config.workers, device=place)
    labels = torch.zeros(loader.images, dtype=torch.int64)
    asked = False
    try:
        for batch, output in answers(teacher, loader, placement, broken=[]):
            logits = rows_of(output)
            if not asked:
                _check_classes(student, placement, batch.images[:2], logits[:2])
                asked = True
            labels[batch.labels] = logits.argmax(dim=-1).cpu()
    finally:
        loader.close()
        placement.release(teacher)
    if not asked:
        raise DataError(
            "None of the validation images could be read",
            hint="Check that the files are images and can be read; --strict tells why",
            code="no-readable-image",
        )
    return Relabelled(data, labels)


def _check_classes(
    student: nn.Module, placement: Placement, images: Tensor, taught: Tensor
) -> None:
    student.to(placement.device)
    with modes_kept(student), placement.autocast():
        student.eval()
        distillation_loss(logits_of(student(images.to(placement.device))), taught, 1.0)
