"""Streams: what reaches a span of modules, cached for all calibration images.

Activations of a thousand images may not fit in memory, so a `Cache` puts what is beyond its limit
into temporary files that are mapped into memory.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from tiedconv.calibration.probing import Call
from tiedconv.data import Loader
from tiedconv.errors import OutputError
from tiedconv.training.device import Placement
from tiedconv.training.evaluation import require_some
from tiedconv.training.objective import first_tensor


class Cache:
    """Large tensors on the CPU, at most `limit` bytes of them in memory. A context manager."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._in_memory: dict[int, int] = {}
        self._files: dict[int, Path] = {}
        self._made = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *_: object) -> None:
        self._in_memory.clear()
        self._files.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def spilled(self) -> int:
        """Number of tensors that were put into files so far."""
        return self._made

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor.

        Raises:
            OutputError: the disk is full.
        """
        count = max(1, torch.Size(shape).numel())
        size = count * dtype.itemsize
        if sum(self._in_memory.values()) + size <= self.limit:
            tensor = torch.empty(tuple(shape), dtype=dtype)
            self._in_memory[tensor.data_ptr()] = size
            return tensor
        path = self._reserve(size)
        tensor = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        self._files[tensor.data_ptr()] = path
        return tensor[: torch.Size(shape).numel()].view(tuple(shape))

    def free(self, tensor: Tensor) -> None:
        """Gives back what `make` made; a tensor from elsewhere is left alone."""
        self._in_memory.pop(tensor.data_ptr(), None)
        path = self._files.pop(tensor.data_ptr(), None)
        if path is not None:
            with contextlib.suppress(OSError):  # a mapped file can't be removed on Windows
                path.unlink()

    def _reserve(self, size: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(
                prefix="tiedconv-", ignore_cleanup_errors=True
            )
        path = Path(self._folder.name) / str(self._made)
        self._made += 1
        try:
            with path.open("wb") as file:
                # A mapped file with holes would end the process when the disk is full.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError as error:
            raise OutputError(
                f"Activations of {size / 2**20:.0f} MiB can't be written to {path.parent} "
                f"({error.strerror})",
                "The calibration can't continue",
                "Free some space, set TMPDIR to another folder, or use fewer images",
                code="disk-full",
            ) from None
        return path


@dataclass(frozen=True)
class Stream:
    """The per-image tensors of a call for all images, each (images, ...)."""

    tensors: tuple[Tensor, ...]

    def take(self, index: Tensor, placement: Placement) -> list[Tensor]:
        """Those of some images, on the device."""
        return [take(tensor, index, placement) for tensor in self.tensors]


def take(tensor: Tensor, index: Tensor, placement: Placement) -> Tensor:
    """A copy of some entries on the device; images and feature maps in the model's layout."""
    return placed(tensor[index], placement)


def placed(batch: Tensor, placement: Placement) -> Tensor:
    """A batch on the device; images and feature maps in the model's layout."""
    if batch.ndim == 4:
        return placement.images(batch)
    return batch.to(placement.device, non_blocking=True)


@dataclass(frozen=True)
class ReadImages:
    """All images of a data set that can be read, in order.

    Args:
        images: `(N, ...)`.
        lost: indices into the data set of the others.
        broken: paths of the others.
    """

    images: Tensor
    lost: list[int]
    broken: list[str]


def read_images(loader: Loader, cache: Cache) -> ReadImages:
    """All images that can be read.

    Raises:
        DataError: no image can be read.
    """
    slab: Tensor | None = None
    count = 0
    broken: list[str] = []
    lost: list[int] = []
    for batch in loader.epoch():
        broken += batch.broken
        lost += batch.lost
        if not len(batch.images):
            continue
        if slab is None:
            slab = cache.make((loader.images, *batch.images.shape[1:]), batch.images.dtype)
        slab[count : count + len(batch.images)] = batch.images
        count += len(batch.images)
    require_some(count, broken)
    assert slab is not None
    return ReadImages(slab[:count], lost, broken)


@torch.no_grad()
def capture(
    model: nn.Module,
    module: nn.Module,
    call: Call,
    images: Tensor,
    batch_size: int,
    placement: Placement,
    cache: Cache,
) -> Stream:
    """What reaches a module of a model, which is run no further than that.

    Args:
        model: on its device, in the mode it should run in.
        module: of the model.
        call: the form of its call.
        images: all images, on the CPU.
        batch_size: images at a time.
        placement: of the model.
        cache: for the result.
    """
    slabs: list[Tensor] = []
    for index in chunks(len(images), batch_size):
        with _caught(module, call) as found, placement.autocast(), contextlib.suppress(Stopped):
            model(take(images, index, placement))
        if not slabs:
            slabs = [cache.make((len(images), *t.shape[1:]), t.dtype) for t in found]
        for slab, tensor in zip(slabs, found, strict=True):
            slab[index] = tensor.cpu()
    return Stream(tuple(slabs))


@torch.no_grad()
def advance(
    stream: Stream,
    modules: Sequence[nn.Module],
    calls: Sequence[Call],
    links: Sequence[tuple[int, ...]],
    batch_size: int,
    placement: Placement,
    cache: Cache,
) -> Stream:
    """The stream after a chain of modules, for the module that follows; the old one is spent.

    Args:
        stream: that reaches the first module.
        modules: each reads what the one before it gives.
        calls: the forms of their calls.
        links: after each module, where the next one's tensors come from, see `Probe.link`.
        batch_size: images at a time.
        placement: of the modules.
        cache: holds the stream.
    """
    for module, call, link in zip(modules, calls, links, strict=True):
        old = stream.tensors
        slab: Tensor | None = None
        for index in chunks(len(old[0]), batch_size):
            with placement.autocast():
                output = call.run(module, stream.take(index, placement))
            if slab is None:
                slab = _room(old, link, output, cache)
            slab[index] = output.cpu()
        assert slab is not None
        stream = Stream(tuple(slab if n < 0 else old[n] for n in link))
        release([Stream(old)], cache, keep=stream)
    return stream


def release(streams: Sequence[Stream], cache: Cache, keep: Stream | None = None) -> None:
    """Gives back the memory of streams, but not what `keep` holds."""
    kept = {t.data_ptr() for t in keep.tensors} if keep else set()
    for stream in streams:
        for tensor in stream.tensors:
            if tensor.data_ptr() not in kept:
                cache.free(tensor)


def _room(old: Sequence[Tensor], link: Sequence[int], output: Tensor, cache: Cache) -> Tensor:
    """Where to put the outputs: over inputs that are no longer needed, if they fit."""
    shape = (len(old[0]), *output.shape[1:])
    for n, tensor in enumerate(old):
        if n not in link and tensor.shape == shape and tensor.dtype == output.dtype:
            return tensor
    return cache.make(shape, output.dtype)


class Stopped(Exception):
    """The forward pass has run as far as needed."""


def _stop() -> NoReturn:
    raise Stopped


@contextlib.contextmanager
def _caught(module: nn.Module, call: Call) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.extend(call.pick(args, kwargs))
        _stop()

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def run_tapped(
    run: Callable[[], Any], modules: Sequence[nn.Module], *, stop: bool
) -> tuple[list[Tensor], Any]:
    """Runs a model and notes what some of its modules give.

    Args:
        run: runs the model.
        modules: each called once.
        stop: whether to end the forward after the last of them.

    Returns:
        the first tensor of each module's output, and the model's output (None if stopped).
    """
    found: dict[int, Tensor] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        assert tensor is not None
        found[id(module)] = tensor.clone()  # what comes next may write into it
        if stop and len(found) == len(modules):
            _stop()

    handles = [module.register_forward_hook(hook) for module in modules]
    result = None
    try:
        with contextlib.suppress(Stopped):
            result = run()
    finally:
        for handle in handles:
            handle.remove()
    return [found[id(module)] for module in modules], result


def chunks(count: int, size: int) -> Iterator[Tensor]:
    """Consecutive parts of `arange(count)`."""
    for start in range(0, count, size):
        yield torch.arange(start, min(count, start + size))
