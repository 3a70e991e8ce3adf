"""How far models' outputs are from those of one original, on the images of a calibration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Loader
from tiedconv.outputs import kind_of
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.training import pick_device
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.device import Placement

CLEARLY = 2.0
"""Standard errors between two models, from which on their order is taken for no chance."""

IMAGES = 512
"""That decide between models, at most."""

KEPT = 256 << 20
"""Bytes of images and of outputs that are kept from one model to the next; others are read and
computed again."""

_Known = tuple[Tensor, Any]
"""A batch of images, and what the original says of it."""


class OutputDivergence:
    """Compares models with one original, on the same batches of images.

    Args:
        original: plain, on the CPU; it must stay as it is.
        data: images.
        batch_size: images at a time.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.
    """

    def __init__(
        self,
        original: nn.Module,
        data: Dataset[Any],
        *,
        batch_size: int = 32,
        device: str = "auto",
        workers: int | None = None,
    ) -> None:
        self._original, self._data, self._batch_size = original, data, batch_size
        self._workers, self._device = workers, pick_device(device)
        self._placement = Placement.choose(original, self._device, "off")
        self._kept: list[_Known] = []
        self._room, self._all = KEPT, False

    @torch.no_grad()
    def of(self, model: nn.Module) -> Tensor:
        """The mean divergence of a model's outputs from the original's, for each batch of images.

        Args:
            model: compact, on the CPU; it is moved to the device and back.

        Returns:
            KL divergence for each image, `(batches,)`; of two models, the same batches.
        """
        found: list[float] = []
        try:
            with modes_kept(model):
                self._placement.place(model)
                model.eval()
                for images, answer in self._known():
                    kind = kind_of(answer, self._original)
                    # Of a copy: a model may write into its input.
                    total = float(kind.divergence(model(images.clone()), answer, model))
                    found.append(total / len(images))
        finally:
            model.cpu()
        return torch.tensor(found, dtype=torch.float64)

    def _known(self) -> Iterator[_Known]:
        """The batches: those that are kept, then those that are not."""
        yield from self._kept
        if not self._all:
            yield from self._computed(len(self._kept))

    def _computed(self, start: int) -> Iterator[_Known]:
        """The batches from number `start` on; they are kept while there is room."""
        loader = Loader(self._data, self._batch_size, workers=self._workers, device=self._device)
        count, keeps = sum(len(images) for images, _ in self._kept), True
        with contextlib.closing(loader), modes_kept(self._original):
            try:
                self._placement.place(self._original)
                self._original.eval()
                for batch in loader.epoch(start=start):
                    if not len(batch.images):
                        keeps = False  # its number would be lost
                        continue
                    images = self._placement.images(batch.images)
                    known = images, checked_forward(self._original, images.clone())
                    keeps = keeps and self._keep(known)
                    count += len(images)
                    yield known
                    if count >= IMAGES:
                        break
                self._all = keeps
            finally:
                self._original.cpu()

    def _keep(self, known: _Known) -> bool:
        """Keeps a batch, unless there is no room."""
        images, answer = known
        tensors = [images, *kind_of(answer, self._original).values(answer)]
        self._room -= sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        if self._room >= 0:
            self._kept.append(known)
        return self._room >= 0


def is_clearly_less(some: Tensor, others: Tensor) -> bool:
    """Whether divergences are less than others of the same batches by more than chance.

    Args:
        some, others: from `OutputDivergence.of`, `(batches,)`.
    """
    gain = others - some
    if len(gain) < 2:
        return bool(gain.mean() > 0)
    return bool(gain.mean() > CLEARLY * gain.std() / len(gain) ** 0.5)
