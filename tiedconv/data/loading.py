"""Batches from a data set, read by worker processes, in an order that depends on the seed only.

The sampler runs in the main process and sends keys, each an index with its own seed. A
worker seeds torch's generator with it before the transform runs. So the same epoch gives the
same tensors whatever the number of workers is, and workers stay alive from epoch to epoch.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tiedconv.data.datasets import Broken
from tiedconv.data.grouping import Indices, consecutive, even
from tiedconv.data.normalize import as_uint8
from tiedconv.data.reading_processes import why_not
from tiedconv.data.seeds import epoch_seed, sample_seeds
from tiedconv.errors import DataError, RunError, TiedconvError, first_line

_log = logging.getLogger(__name__)

SampleKey = tuple[int, int]
"""An index into the data set, and the seed for what is random in reading it."""

MAX_WORKERS = 8
PREFETCH = 2
"""Batches that each worker may have ready."""


class Batch(NamedTuple):
    """One batch; it may be empty when none of its images could be read.

    Attributes:
        images: shape (B, C, H, W).
        labels: shape (B,), int64.
        broken: paths of the images that were left out.
        error: an error to raise in the main process.
        lost: indices of the images that were left out.
    """

    images: Tensor
    labels: Tensor
    broken: Sequence[str] = ()
    error: TiedconvError | None = None
    lost: Sequence[int] = ()


class Loader:
    """Seeded batches of a data set, epoch by epoch.

    Args:
        data: gives (image, label), or `Broken`, for each index. With a method
            `read_batch(indices, seeds)` it is asked for a batch at a time. With an attribute
            `groups` (`data.grouping`), each batch has samples of one group.
        batch_size: the largest number of images in a batch.
        shuffle: a new order in each epoch, and batches of nearly equal sizes (a last batch of
            one image would harm both batch norm and the gradient); otherwise in order.
        seed: decides order and augmentation, together with the epoch.
        workers: reading processes; 0 reads in this one; None chooses.
        device: where images are needed: they are put there, on the way as bytes where the data
            set can give bytes. None leaves them in this machine's memory.
        part: (rank, count) of several processes that share the work: each batch is divided
            evenly between them, so one process has a part of each, which may be empty.

    Raises:
        DataError: an empty data set; or, while reading, what the data set raises.
    """

    def __init__(
        self,
        data: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        workers: int | None = None,
        device: torch.device | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        count = len(data)  # type: ignore[arg-type]
        if count == 0:
            raise DataError(
                "The data set is empty", hint="Give at least one image", code="no-images"
            )
        self.images = count
        self.groups: Indices | None = getattr(data, "groups", None)
        self._sampler = _EpochBatches(count, batch_size, shuffle, seed, part, self.groups)
        # A data set with few batches has no use for more readers than batches.
        workers = min(default_workers(data) if workers is None else workers, len(self._sampler))
        if workers and (reason := why_not(data)):
            _say_once(reason)
            workers = 0
        self._data, self._normalisation = as_uint8(data)
        self._workers, self._device = workers, device
        self._loader: DataLoader[Batch] | None = None

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._sampler)

    def size(self, index: int) -> int:
        """Images that the batch of this number has in all processes together."""
        return self._sampler.size(index)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from number `start` on; may be left early."""
        self._sampler.epoch, self._sampler.start = epoch, start
        if self._loader is None:
            self._loader = self._open()
        for batch in _from_workers(self._loader):
            if batch.error is not None:
                self.close()
                raise batch.error
            yield batch._replace(images=self._ready(batch.images))

    def close(self) -> None:
        """Ends the workers; another epoch would start new ones.

        Left to the cycle collector, as after an error whose traceback holds the loader, ending
        them takes five seconds.
        """
        self._loader = None

    def _ready(self, images: Tensor) -> Tensor:
        """Images as the model takes them, where it takes them."""
        if self._device is not None:
            images = images.to(self._device, non_blocking=True)
        if self._normalisation is not None and len(images):
            images = self._normalisation(images)
        return images

    def _open(self) -> DataLoader[Batch]:
        workers = self._workers
        return DataLoader(
            _BatchReader(self._data),
            batch_sampler=self._sampler,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            multiprocessing_context=_context() if workers else None,
            # Page-locked memory is copied to the device while this process continues.
            pin_memory=self._device is not None and self._device.type == "cuda",
            # Its own generator: otherwise making an iterator draws from the global one.
            generator=torch.Generator(),
        )


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("Images are read by this process alone: %s.", reason)


def _from_workers(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The batches; a worker that was killed is an error of this package."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            f"A process that reads images has ended ({first_line(error)[:120]})",
            "The rest of the images can't be read",
            "It may have run out of memory: use fewer --workers, or --workers 0 to see the error",
            code="worker-lost",
        ) from error


class _EpochBatches(Sampler[list[SampleKey]]):
    """Lists of keys for one epoch after another."""

    def __init__(
        self, count: int, batch_size: int, shuffle: bool, seed: int, part: tuple[int, int],
        groups: Indices | None,
    ) -> None:  # fmt: skip
        self.count, self.batch_size, self.shuffle, self.seed = count, batch_size, shuffle, seed
        self.part, self.groups = part, groups
        self.epoch = self.start = 0

    def __len__(self) -> int:
        if self.groups is not None:
            _, counts = np.unique(self.groups, return_counts=True)
            return int((-(-counts // self.batch_size)).sum())
        return -(-self.count // self.batch_size)

    def size(self, index: int) -> int:
        if self.groups is not None:
            return len(self._batches()[index])
        if self.shuffle:  # as array_split does it
            whole, more = divmod(self.count, len(self))
            return whole + (index < more)
        return min(self.batch_size, self.count - index * self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        seeds = sample_seeds(self.seed, self.epoch, self.count)
        rank, parts = self.part
        for group in self._batches()[self.start :]:
            own = np.array_split(group, parts)[rank]
            yield list(zip(own.tolist(), seeds[own].tolist(), strict=True))

    def _batches(self) -> list[Indices]:
        """The batches of this epoch, for all processes together."""
        if not self.shuffle:
            return consecutive(np.arange(self.count), self.batch_size, self.groups)
        random = np.random.default_rng(epoch_seed(self.seed, self.epoch))
        return even(random.permutation(self.count), self.batch_size, self.groups, random)


class _BatchReader(Dataset[Batch]):
    """Reads batches from lists of keys; runs in the worker."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __getitem__(self, key: SampleKey) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[SampleKey]) -> Batch:
        # Errors travel as values: a DataLoader would bury the message in a traceback's text.
        try:
            return self._read(keys)
        except TiedconvError as error:
            return Batch(torch.empty(0), torch.empty(0, dtype=torch.int64), (), error)

    def _read(self, keys: list[SampleKey]) -> Batch:
        read_batch = getattr(self.data, "read_batch", None)
        if read_batch is not None and keys:  # a process may have no image in a last batch
            return Batch(*read_batch(*zip(*keys, strict=True)))
        images: list[Tensor] = []
        labels: list[int] = []
        broken: list[str] = []
        lost: list[int] = []
        # In this process the generator belongs to the training loop, so it is put back. Only the
        # CPU's is touched: torch.manual_seed would also queue seeds for devices, slowly.
        before = torch.get_rng_state()
        try:
            for index, seed in keys:
                torch.default_generator.manual_seed(seed)
                sample = self.data[index]
                if isinstance(sample, Broken):
                    broken.append(sample.path)
                    lost.append(index)
                else:
                    image, label = _image_and_label(sample)
                    images.append(image)
                    labels.append(label)
        finally:
            torch.set_rng_state(before)
        return Batch(_stacked(images), torch.tensor(labels, dtype=torch.int64), broken, lost=lost)


def _image_and_label(sample: Any) -> tuple[Tensor, int]:
    """What a data set gave; an image alone has the label 0.

    Raises:
        DataError: neither a tensor nor a pair of a tensor and something (`samples-malformed`).
    """
    if isinstance(sample, Tensor):
        return sample, 0
    if isinstance(sample, tuple | list) and len(sample) > 1 and isinstance(sample[0], Tensor):
        return sample[0], int(sample[1])
    kinds = ", ".join(type(part).__name__ for part in sample) if isinstance(sample, tuple) else ""
    raise DataError(
        f"The data set gives {type(sample).__name__}{f' of {kinds}' if kinds else ''}",
        "It can't be read as images",
        "Give tensors (C, H, W), as the model takes them, or pairs of such a tensor and a label",
        code="samples-malformed",
    )


def _stacked(images: list[Tensor]) -> Tensor:
    """One tensor `(B, ...)`.

    Raises:
        DataError: the images differ in shape (`samples-differ`).
    """
    if len({image.shape for image in images}) > 1:
        shapes = " and ".join(map(str, sorted({tuple(image.shape) for image in images})[:2]))
        raise DataError(
            f"Images of one data set differ in shape: {shapes}",
            "They can't be run together",
            "Resize or crop them to one size, as the model wants them; a data set that has an "
            "attribute `groups` is read in batches of one shape",
            code="samples-differ",
        )
    return torch.stack(images) if images else torch.empty(0)


def default_workers(data: Dataset[Any]) -> int:
    """Reading processes for a data set: none for one in memory, else one per CPU, at most 8."""
    inner = getattr(data, "dataset", data)  # a torch Subset wraps the real one
    if getattr(inner, "in_memory", False):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_WORKERS, cores or 1)


def _as_is(batch: Any) -> Any:
    # `__getitems__` has made a whole batch already; there is nothing to collate.
    return batch


def _context() -> Any:
    """How to start workers: never by forking this process.

    torch has threads, and a fork of a process with threads may hang (Python 3.12 warns of it).
    A fork server is a clean process that imports once and then forks fast. Where there is none
    (Windows), each worker starts from scratch. Either way a script needs the usual
    `if __name__ == "__main__":`; without, there are no workers (`reading_processes`).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiedconv.data.worker_imports"])
    return context
