"""Distributed training: each process reads a part of every batch, all end with the same model.

`torchrun` and `accelerate launch` start a program once for each device and tell each copy, in its
environment, which it is. All else is torch's own. Accelerate itself is not used: it adds nothing
to the calls below, keeps one global state for the whole process, and shards nothing on CPUs, so
that what runs on a GPU could not be tested on a machine without one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tiedconv.errors import (
    DataError,
    OutputError,
    RunError,
    TiedconvError,
    UserError,
    first_line,
)
from tiedconv.training.device import pick_device

T = TypeVar("T")


@dataclass(frozen=True)
class DistContext:
    """Which of the training processes this is; the only one, unless it was launched otherwise.

    Attributes:
        rank: from 0.
        count: of processes, over all machines.
    """

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.count > 1

    @contextlib.contextmanager
    def losses_as_errors(self) -> Iterator[None]:
        """Within it, a process that ended or can't be reached any more is an error of ours.

        Raises:
            RunError: another process of this run is gone (`process-lost`).
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error).lower()
            if not self.several or not lost:
                raise
            raise RunError(
                f"Another process of this run is gone ({first_line(error)[:120]})",
                "No process can go on alone; the last checkpoint is kept",
                "See what ended it (memory, a signal), then run the same command with --resume and "
                f"{self.count} processes",
                code="process-lost",
            ) from error

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over the processes, in place."""
        if self.several:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flags: list[bool], device: torch.device) -> list[bool]:
        """Which of the flags are set in any process. All must call it at the same point."""
        if not self.several:
            return flags
        votes = torch.tensor(flags, dtype=torch.float32, device=device)
        return [vote > 0 for vote in self.sum(votes).tolist()]

    def gathered(self, thing: T) -> list[T]:
        """What each process has, in all of them. All must call it at the same point."""
        if not self.several:
            return [thing]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, thing)
        return found

    def broadcast_int(self, number: int) -> int:
        """A number of the first process, in all of them."""
        if not self.several:
            return number
        numbers = [number]
        dist.broadcast_object_list(numbers)
        return numbers[0]

    def run_on_rank0(self, action: Callable[[], None], device: torch.device) -> None:
        """What one process does for all; they wait for it, and its failure ends all of them.

        Raises:
            TiedconvError: as the action does; in the others, that the first could not do it.
        """
        problem: TiedconvError | None = None
        if self.first:
            try:
                action()
            except TiedconvError as error:
                problem = error
        (failed,) = self.any([problem is not None], device)
        if problem is not None:
            raise problem
        if failed:
            raise OutputError("The first process could not write; see there", code="rank0-failed")


ALONE = DistContext()


class PaddingImage:
    """A stand-in image for a process that has none in a batch while the others have.

    What is computed from it counts for nothing, but all processes must call the model equally
    often: in a sharded one they wait for each other.
    """

    def __init__(self, processes: DistContext) -> None:
        self.several = processes.several
        self.last: Tensor | None = None

    def instead_of_none(self, images: Tensor) -> Tensor | None:
        """The images (B, C, H, W); the spare one if there are none; None if it isn't needed.

        Raises:
            DataError: none is known yet.
        """
        if not self.several:
            return images if len(images) else None
        if len(images):
            self.last = images[:1]
            return images
        if self.last is None:
            raise DataError(
                "One of the processes has no readable image in the first batch",
                "The others would wait for it",
                "Remove broken images, use a larger batch or fewer processes",
                code="no-readable-image",
            )
        return self.last


def launched() -> int:
    """How many processes a launcher has started; 1 without one.

    Raises:
        UserError: an environment that no launcher makes.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        count = 0
    if count < 1 or (count > 1 and "RANK" not in os.environ):
        raise UserError(
            "The environment names several processes (WORLD_SIZE), but not which this is (RANK)",
            "They can't find each other",
            "Start it with torchrun or accelerate launch, or unset WORLD_SIZE",
            code="rank-missing",
        )
    return count


def rank_in_environment() -> int:
    """The number of this process, before it has joined the others."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() and os.environ.get("WORLD_SIZE", "1") != "1" else 0


@contextlib.contextmanager
def init_distributed(device: str | torch.device) -> Iterator[tuple[DistContext, torch.device]]:
    """Within it, the launched processes know each other.

    Args:
        device: as `pick_device` takes it; of several processes each takes a GPU of its own.

    Raises:
        UserError: a device that is not there, or one named for several processes.
    """
    if not dist.is_available() or (launched() == 1 and not dist.is_initialized()):
        yield ALONE, pick_device(device)
        return
    place = _device_of_this(device)
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield DistContext(dist.get_rank(), dist.get_world_size()), place
    finally:
        if mine:
            dist.destroy_process_group()


def _device_of_this(device: str | torch.device) -> torch.device:
    place = pick_device(device)
    if place.type == "mps":
        place = torch.device("cpu")  # it knows no collective operations
    if place.type != "cuda":
        return place
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if place.index not in (None, local):
        raise UserError(
            f"The device {device} was asked for by several processes",
            "All would use the one",
            "Choose --device cuda: each process then takes a GPU of its own",
            code="device-shared",
        )
    if local >= torch.cuda.device_count():
        raise UserError(
            f"Process {local} of this machine finds {torch.cuda.device_count()} GPUs",
            "It has none to itself",
            f"Launch {torch.cuda.device_count()} processes, or choose --device cpu",
            code="device-missing",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def check_shares(processes: DistContext, batch_size: int, images: int) -> None:
    """Raises UserError where some process would have nothing to do.

    Args:
        processes: that share each batch.
        batch_size: of all together.
        images: in the smallest of the data sets.
    """
    if processes.several and min(batch_size, images) < processes.count:
        raise UserError(
            f"{processes.count} processes share batches of {batch_size} images, and the smallest "
            f"data set has {images}",
            "Some of them would have nothing to do",
            "Use larger batches, more images or fewer processes",
            code="too-few-images",
        )
