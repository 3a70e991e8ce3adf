"""The training's own loss on held-out images, by which the best state of a run is found."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Broken
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.distributed import DistContext
from tiedconv.training.objective import Loss
from tiedconv.training.wrappers import TrainWrapper

MOST_IMAGES = 512
MOST_BYTES = 128 * 2**20
"""Of the images, which are kept in memory."""

AT_ONCE = 32


class Remembered(nn.Module):
    """A teacher that is asked once for each batch of the held-out images.

    Attributes:
        key: of the next batch.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher
        self.key: tuple[int, int] = (0, 0)
        self._outputs: dict[tuple[int, int], Any] = {}

    def forward(self, images: Tensor) -> Any:
        """The teacher's output for the batch of the key."""
        if self.key not in self._outputs:
            self._outputs[self.key] = self.teacher(images)
        return self._outputs[self.key]


class HeldOutLoss:
    """Measures the loss of a model on the same few images each time, in evaluation mode.

    With a teacher and a distillation weight of 1 it is the distance to the teacher.

    Args:
        data: held-out images, as they are evaluated on; some are read, evenly spread.
        objective: gives the loss of a batch.
        learner: the model.
        processes: each measures a part.
        remembered: the teacher of the objective, if it has one.
    """

    def __init__(
        self,
        data: Dataset[Any],
        objective: Loss,
        learner: TrainWrapper,
        processes: DistContext,
        remembered: Remembered | None = None,
    ) -> None:
        self._remembered = remembered
        self._objective, self._learner, self._processes = objective, learner, processes
        self.images, self._labels = _some(data, processes)
        self.seconds = 0.0  # that the last measurement of all images took

    def measure(self, count: int | None = None) -> float:
        """The mean loss, over the processes too; all must call it.

        Args:
            count: use only so many of the images of each process.
        """
        began = time.perf_counter()
        total = torch.zeros((), dtype=torch.float64)
        images, labels = self.images[:count], self._labels[:count]
        model = self._learner.model
        with modes_kept(model), torch.no_grad():
            model.eval()
            for start in range(0, len(images), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                if self._remembered is not None:
                    self._remembered.key = (start, len(images[part]))
                loss = self._objective(images[part], labels[part], 0).loss
                total += loss.double().cpu() * len(images[part])
        self._learner.after_evaluation()
        if count is None:
            self.seconds = time.perf_counter() - began
        means = self._processes.gathered(float(total) / max(1, len(images)))
        return sum(means) / len(means)


def _some(data: Dataset[Any], processes: DistContext) -> tuple[Tensor, Tensor]:
    """Images and what stands beside them; as many in each process."""
    size: int = len(data)  # type: ignore[arg-type]
    found: list[Any] = []
    count = min(size, MOST_IMAGES)
    for i in range(processes.rank, count, processes.count):
        item = data[i * size // count]
        if isinstance(item, Broken):
            continue
        found.append(item)
        if len(found) * found[0][0].nbytes >= MOST_BYTES // processes.count:
            break
    least = min(processes.gathered(len(found)))
    if least == 0:
        return torch.empty(0), torch.empty(0, dtype=torch.int64)
    found = _spread(found, least)
    return (
        torch.stack([item[0] for item in found]),
        torch.tensor([int(item[1]) for item in found]),
    )


def _spread(items: list[Any], count: int) -> list[Any]:
    return [items[i * len(items) // count] for i in range(count)]
