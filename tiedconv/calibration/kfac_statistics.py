"""Second moments of the inputs of every weight and of the gradients of its outputs.

Products with a weight are intercepted below all modules: in the forward pass the other factor of a
product is the weight's input, in the backward pass the gradient of its output. So fused
projections, functional attention and convolutions are all seen, whatever module calls them. The
loss is the model's own: the log-likelihood of a class drawn from its output, so no label is needed,
and the statistics are those of the Fisher matrix.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import Dataset

from tiedconv.calibration.conv_statistics import ConvGeometry, gradient_energy, patches_at
from tiedconv.calibration.frozen import frozen
from tiedconv.calibration.output_metric import forward_with_grad
from tiedconv.calibration.second_moments import SecondMoment
from tiedconv.data import Loader
from tiedconv.errors import DataError
from tiedconv.numerics.kfac_metric import KfacMetric, shrinkage_estimate
from tiedconv.outputs import kind_of
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.runtime.sample_table import kept_tokens
from tiedconv.training import pick_device
from tiedconv.training.device import Placement

POSITIONS = 64
"""Of an image's tokens or pixels, at most so many enter the statistics, spread evenly."""

MEMORY = 8 * 2**30
"""Bytes that the sums of one pass over the images may take: what needs more takes more passes."""

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


@dataclass(frozen=True)
class KfacStatistics:
    """What `gather_statistics` found.

    Args:
        metrics: tensor name to metric, for every weight that took part.
        ridges: tensor name to the ridges chosen for its two sides.
        images: how many were read.
        skipped: how many could not be read.
    """

    metrics: Mapping[str, KfacMetric]
    ridges: Mapping[str, tuple[float, float]]
    images: int
    skipped: int

    @property
    def ridge(self) -> float | None:
        """The median of all ridges."""
        found = sorted(ridge for pair in self.ridges.values() for ridge in pair)
        return found[len(found) // 2] if found else None


@dataclass
class _Sums:
    """What is summed up for one weight."""

    right: SecondMoment = field(default_factory=SecondMoment)
    left: SecondMoment = field(default_factory=SecondMoment)
    energy: Tensor | float = 0.0
    """Of a convolution, the squared norms of the weight's gradients of all images."""


def gather_statistics(
    model: nn.Module,
    weights: Mapping[str, bool],
    data: Dataset[Any],
    *,
    batch_size: int = 32,
    seed: int = 0,
    device: str = "auto",
    workers: int | None = None,
    memory: int = MEMORY,
    least_ridge: float = 0.0,
    on_images: Callable[[int, int], None] | None = None,
) -> KfacStatistics:
    """The metric of each weight of a model, from images without labels.

    While images are read, a weight's two statistics of `in^2 + out^2` entries take 6 (wide) to 12
    (narrow) bytes each; the metrics that remain take 4.

    Args:
        model: plain, not tied; its parameters and modes are left as they are.
        weights: tensor names, and whether each is stored as `(in, out)`.
        data: gives (image, label); labels are not looked at.
        batch_size: images at a time.
        seed: of the classes drawn, and of which images make up each half.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.
        memory: bytes for the sums. Weights whose sums don't fit in together are measured in
            several passes over the same images; the result is the same.
        least_ridge: of each moment; more where the images are unlike those of the model's use.
        on_images: called with (images done, images in all), over all passes.

    Raises:
        DataError: no image could be read.
    """
    placement = Placement.choose(model, pick_device(device), "off")
    placement.place(model)
    # Alternate batches are the two halves. A batch can't be halved itself: nn.MultiheadAttention
    # has tokens before images, which leaves the rows of an image unmarked.
    count = len(data)  # type: ignore[arg-type]
    batches = 2 * max(1, -(-count // (2 * batch_size)))
    loader = Loader(
        data, -(-count // batches), shuffle=True, seed=seed, workers=workers,
        device=placement.device,
    )  # fmt: skip
    metrics: dict[str, KfacMetric] = {}
    ridges: dict[str, tuple[float, float]] = {}
    parts = _parts(model, weights, memory)
    try:
        with frozen(model):
            for i, part in enumerate(parts):
                whole = len(parts) * loader.images
                report = functools.partial(_report_progress, on_images, i * loader.images, whole)
                watch = _Watch(model, part)
                counts, skipped = _one_pass(model, loader, watch, placement, seed, report)
                _finish(watch.sums, counts, metrics, ridges, least_ridge)
    finally:
        loader.close()
        placement.release(model)
    if not sum(counts):
        raise DataError(
            "None of the calibration images could be read",
            "Nothing can be measured",
            "Check that the folder holds images",
            code="no-readable-image",
        )
    return KfacStatistics(metrics, ridges, sum(counts), skipped)


def _parts(model: nn.Module, weights: Mapping[str, bool], memory: int) -> list[dict[str, bool]]:
    """The weights in parts, the sums of each of which fit into so many bytes."""
    parts: list[dict[str, bool]] = [{}]
    found, left = dict(model.named_parameters()), memory
    for name, transposed in weights.items():
        size = 0
        if name in found:
            shape = found[name].shape
            out = shape[transposed]
            size = SecondMoment.nbytes(out) + SecondMoment.nbytes(shape.numel() // out)
        if size > left and parts[-1]:
            parts.append({})
            left = memory
        parts[-1][name] = transposed
        left -= size
    return parts


def _report_progress(
    on_images: Callable[[int, int], None] | None, before: int, whole: int, done: int
) -> None:
    """Progress of one of several passes, as that of all."""
    if on_images is not None:
        on_images(before + done, whole)


def _one_pass(
    model: nn.Module, loader: Loader, watch: _Watch, placement: Placement, seed: int,
    report: Callable[[int], None],
) -> tuple[list[int], int]:  # fmt: skip
    """Sums up over all images; how many there were in each half, and how many were unreadable."""
    generator = torch.Generator().manual_seed(seed)
    counts, skipped = [0, 0], 0
    for batch in loader.epoch():
        skipped += len(batch.broken)
        # Of a shape that few samples have there may be one batch, which then gives to both halves.
        parts = batch.images.chunk(1 if loader.groups is None else 2)
        for images in parts if len(batch.images) else ():
            watch.half = 1 - watch.half
            counts[watch.half] += len(images)
            _one_batch(model, placement.images(images), watch, generator)
        report(sum(counts))
    return counts, skipped


def _one_batch(
    model: nn.Module, images: Tensor, watch: _Watch, generator: torch.Generator
) -> None:  # fmt: skip
    # The images ask for a gradient, so that one reaches what every weight wrote.
    watch.batch = len(images)
    with torch.enable_grad(), watch:
        images = forward_with_grad(model, images)
        watch.backward = False
        output = checked_forward(model, images)
        loss = kind_of(output, model).drawn_loss(output, model, generator)
        watch.backward = True
        asking = [images] if images.requires_grad else [*model.parameters()]
        torch.autograd.grad(loss, asking, allow_unused=True)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds the other factor of every product with a watched weight to its sums."""

    def __init__(self, model: nn.Module, weights: Mapping[str, bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        found = dict(model.named_parameters())
        self._by_storage = {
            found[name].untyped_storage().data_ptr(): (name, tuple(found[name].shape), transposed)
            for name, transposed in weights.items()
            if name in found
        }
        self._outs = {name: shape[transposed] for name, shape, transposed in
                      self._by_storage.values()}  # fmt: skip
        self.sums = {name: _Sums() for name in weights}
        self._model = model
        # It has tokens before images, so that its rows do not lie as those of a mask.
        self._by_tokens = any(isinstance(m, nn.MultiheadAttention) for m in model.modules())
        self.half = 1
        self.batch = 0
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _PRODUCTS:
            self._product(*args[-2:])
        elif name == "convolution" and not self.backward:
            self._convolution(out, *args[:9])
        elif name == "convolution_backward":
            self._gradient(*args)
        return out

    def _product(self, a: Tensor, b: Tensor) -> None:
        for weight, other in ((b, a), (a, b.mT)):
            if found := self._by_storage.get(_storage(weight)):
                name, shape, transposed = found
                # A product may use some rows of the weight only, as of one of q, k, v.
                offset = int(weight.storage_offset())
                start = offset % shape[1] if transposed else offset // shape[1]
                self._add(name, other.reshape(-1, other.shape[-1]), start)
                return

    def _convolution(
        self, out: Tensor, x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any,
        dilation: Any, transposed: bool, __: Any, groups: int,
    ) -> None:  # fmt: skip
        found = self._by_storage.get(_storage(weight))
        if found and not transposed and x.ndim == 4:
            # Groups read as many inputs each: one moment stands for all.
            how = ConvGeometry(weight.shape[2:], stride, padding, dilation, groups)
            which = _evenly(math.prod(out.shape[2:]) * groups, x.device)
            self._add(found[0], patches_at(x, how, which, out.shape[3]), 0)

    def _gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, _: Any, stride: Any, padding: Any,
        dilation: Any, transposed: bool, __: Any, groups: int, ___: Any,
    ) -> None:  # fmt: skip
        found = self._by_storage.get(_storage(weight))
        if found and not transposed and x.ndim == 4:
            self._add(found[0], gradient.movedim(1, -1).flatten(0, -2), 0)
            how = ConvGeometry(weight.shape[2:], stride, padding, dilation, groups)
            self.sums[found[0]].energy += gradient_energy(gradient, x, how)

    def _add(self, name: str, rows: Tensor, start: int) -> None:
        """Add rows `(images * places, width)`, of outputs from `start` on."""
        sums, half = self.sums[name], self.half
        kept = None if self._by_tokens else kept_tokens(self._model)
        if kept is not None and kept.numel() == len(rows):
            rows, scale = _some_tokens(rows, kept, of_image=self.backward), 1.0
        else:
            rows, scale = _some(rows, self.batch)
        if self.backward:  # the gradients of all places add up to that of the image
            sums.left.add(rows, half, start=start, width=self._outs[name], scale=scale)
        else:
            sums.right.add(rows, half)


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage().data_ptr() if isinstance(tensor, Tensor) else 0


def _some(rows: Tensor, images: int) -> tuple[Tensor, float]:
    """Some places of every image, and how many each stands for."""
    places = len(rows) // images if images and len(rows) % images == 0 else 1
    if places <= POSITIONS:
        return rows, 1.0
    kept = _evenly(places, rows.device)
    return rows.reshape(images, places, -1)[:, kept].flatten(0, 1), places / POSITIONS


def _some_tokens(rows: Tensor, kept: Tensor, *, of_image: bool) -> Tensor:
    """Some tokens of every text, none of them padding.

    Args:
        rows: `(texts * tokens, width)`.
        kept: `(texts, tokens)`, false for padding.
        of_image: whether they are to add up to the sum over a text, rather than to a mean.
    """
    found = []
    for own, counts in zip(rows.reshape(*kept.shape, -1), kept, strict=True):
        tokens = own[counts]
        some = tokens[_evenly(len(tokens), rows.device)]
        found.append(some * math.sqrt(len(tokens) / len(some)) if of_image else some)
    return torch.cat(found)


def _evenly(places: int, device: torch.device) -> Tensor:
    """At most `POSITIONS` of so many places, spread evenly."""
    return torch.linspace(0, places - 1, min(places, POSITIONS), device=device).long()


def _finish(
    sums: dict[str, _Sums],
    counts: Sequence[int],
    metrics: dict[str, KfacMetric],
    ridges: dict[str, tuple[float, float]],
    least: float,
) -> None:
    """Turns sums into metrics, and lets each go when it is done."""
    for name in list(sums):
        s = sums.pop(name)
        # Of one image alone, both halves are the same, and the ridge is the least there is.
        halves = [h for h in (0, 1) if s.right.rows[h] and s.left.rows[h]]
        if not halves:
            continue  # what it writes reaches no output, or it was never used
        right, first, inputs = _side(s.right, halves, s.right.rows, least)
        left, second, outputs = _side(s.left, halves, counts, least)
        # What a side that stands for the identity is multiplied by goes into the other one.
        for side, factor in ((left, inputs), (right, outputs)):
            if side is not None and factor != 1.0:
                side.mul_(factor)
        traces = [
            float(m.width if side is None else side.trace())
            for m, side in ((s.left, left), (s.right, right))
        ]
        energy = float(s.energy) / sum(counts)
        metrics[name] = _scaled(KfacMetric(left, right), energy, traces[0] * traces[1])
        ridges[name] = (first, second)


def _side(
    moment: SecondMoment, halves: Sequence[int], counts: Sequence[int], least: float
) -> tuple[Tensor | None, float, float]:
    """A moment, its ridge, and 1; of one that is too wide None, and the mean of its diagonal."""
    entry = moment.mean_entry(sum(counts[half] for half in halves))
    if entry is not None:
        return None, 1.0, entry
    return *_shrunk(moment, halves, counts, least), 1.0


def _shrunk(
    moment: SecondMoment, halves: Sequence[int], counts: Sequence[int], least: float
) -> tuple[Tensor, float]:
    """The well-conditioned moment on the CPU, float32, and its ridge."""
    means = [moment.mean(half, counts[half]) for half in halves]
    whole, ridge = shrinkage_estimate(means[0], means[-1], least)
    return whole.cpu(), ridge


def _scaled(metric: KfacMetric, energy: float, known: float) -> KfacMetric:
    """The metric scaled to the costs that the gradients of a convolution's weight show.

    K-FAC takes the places of an image to be independent. A convolution's are not: its costs came
    out four to six times too low, and too much was taken from convolutions where a model has
    linear layers too. The trace of the Fisher matrix is known exactly: it is the mean squared
    norm of the weight's gradient of an image.

    Args:
        metric: by K-FAC.
        energy: that mean; zero where it was not measured.
        known: the product of the traces of both sides.
    """
    left, right = metric.left, metric.right
    if not energy > 0 or not known > 0:
        return metric
    if left is None:
        return KfacMetric(None, None if right is None else right * (energy / known))
    return KfacMetric(left * (energy / known), right)
