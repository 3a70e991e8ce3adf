"""The verb `sensitivity`: what it costs to store each matrix of a model with fewer numbers.

For each matrix alone: the best low-rank approximation at a fraction of its parameters, in the
Fisher-weighted error (see `tiedconv.numerics.kfac_metric`), or the matrix in integers of some bits,
rounded with error feedback. Its error (of the low rank, half the sum of the squared singular values
beyond the rank) predicts the KL divergence of the model's outputs from the original's. Measured,
the matrix is replaced, the images are run, and the outputs are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import KfacStatistics
from tiedconv.conversion.calibrate import Calibration, Images
from tiedconv.conversion.sample_inputs import calibration_samples
from tiedconv.core.packed_codes import WIDTHS
from tiedconv.core.plan import Member, Slot
from tiedconv.core.units import matrices_of as mixing_slots
from tiedconv.data import Loader
from tiedconv.errors import NothingToConvert, RecipeError, UserError
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.linalg import spectrum
from tiedconv.numerics.rounding import Rounding
from tiedconv.outputs import kind_of
from tiedconv.planning.rank_allocation import metrics_of
from tiedconv.runtime.forward_check import checked_forward
from tiedconv.runtime.tensors import state_tensors
from tiedconv.schemes._stacks import fuse
from tiedconv.sources import AS_PUBLISHED, Preprocess, Reading
from tiedconv.sources.models import open_model
from tiedconv.sources.published_weights import Weights
from tiedconv.training import pick_device
from tiedconv.training.batchnorm import modes_kept
from tiedconv.training.device import Placement

FLOAT_BITS = 32.0

OnImages = Callable[[int, int], None]


@dataclass(frozen=True)
class Sensed:
    """One matrix.

    Args:
        name: its block and role, such as `blocks.3.attn.qkv`.
        layer: the part of the name up to the layer's number.
        role: the rest of the name.
        tensor: the weight that holds it.
        parameters: of the matrix.
        rank: of its approximation; None where it is rounded.
        stored: parameters of that.
        bits: of each stored parameter on average: 32, or those of the integers.
        predicted: divergence from the original's answers, in nats for each image, None for a
            matrix that the images never reached.
        measured: the same, by running the images.
        changed: share of images whose first answer changes, 0 to 1.
    """

    name: str
    layer: str
    role: str
    tensor: str
    parameters: int
    rank: int | None
    stored: int
    bits: float
    predicted: float | None
    measured: float | None = None
    changed: float | None = None

    @property
    def per_megabyte(self) -> float | None:
        """Nats for each million bytes saved of float32: measured if it was, else predicted."""
        cost = self.predicted if self.measured is None else self.measured
        saved = FLOAT_BITS * self.parameters - self.bits * self.stored
        return None if cost is None or saved < 8 else 8e6 * cost / saved


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found.

    Args:
        model: its spec.
        keep: the share of its parameters that each matrix keeps at most; 1 where it is rounded.
        bits: of its integers, None where it is not rounded.
        images: that were used.
        skipped: that could not be read.
        rows: the matrices, in the model's own order.
        seconds: time taken.
    """

    model: str
    keep: float
    bits: int | None
    images: int
    skipped: int
    rows: tuple[Sensed, ...]
    seconds: float

    @property
    def how(self) -> str:
        """What is done to each matrix, in words."""
        rounded = self.bits is not None
        return f"{self.bits} bits" if rounded else f"{100 * self.keep:g} % of its parameters"

    @property
    def by_price(self) -> tuple[str, ...]:
        """Names, the cheapest for each byte saved first."""
        priced = [(r.per_megabyte, r.name) for r in self.rows if r.per_megabyte is not None]
        return tuple(name for _, name in sorted(priced))

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of predicted and measured divergences; None if too few were measured."""
        pairs = self._pairs()
        if len(pairs) < 3:
            return None
        orders = torch.tensor(pairs, dtype=torch.float64).argsort(0).argsort(0).double()
        return float(torch.corrcoef(orders.t())[0, 1])

    @property
    def measured_to_predicted(self) -> float | None:
        """The median ratio of measured to predicted divergences."""
        ratios = sorted(m / p for p, m in self._pairs() if p > 0)
        return ratios[len(ratios) // 2] if ratios else None

    def _pairs(self) -> list[tuple[float, float]]:
        return [
            (r.predicted, r.measured)
            for r in self.rows
            if r.predicted is not None and r.measured is not None
        ]


def sensitivity(
    model: str | nn.Module,
    calib: Images | Calibration,
    *,
    keep: float = 0.5,
    bits: int | None = None,
    measure: bool = False,
    weights: Weights = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Callable[[Preprocess], Preprocess] | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_measured: OnImages | None = None,
) -> Sensitivity:
    """What it costs to store each matrix of a model alone with fewer numbers.

    Args:
        model: a model, which is left as it is, or its spec, such as `resnet50`.
        calib: images without labels: a folder, a data set, or a `Calibration` that says how many.
        keep: the share of its parameters that each matrix keeps at most, above 0 and below 1.
        bits: round each matrix to integers of so many bits (2 to 8) instead.
        measure: also replace each matrix and run the images.
        weights: for a spec: `default`, `none`, or a file.
        reading: which weights of a file, and what to do where they are not finite.
        model_args: arguments of the model's constructor, for a spec.
        preprocess: changes how images are prepared.
        batch_size: images at a time, where it measures.
        seed: of random weights.
        on_measured: called with (images done, images in all), where it measures.

    Raises:
        NothingToConvert: no matrix was found in this model.
        DataError: a folder without images, or none that can be read.
        RecipeError: integers have no such number of bits (`invalid-bits`).
        UserError: a model or a share that can't be used.
    """
    start = time.perf_counter()
    if not 0 < keep < 1:
        raise UserError(
            f"Invalid keep={keep:g}: it is not a fraction in (0, 1)",
            hint="Use a number above 0 and below 1, such as 0.5",
            code="keep-out-of-range",
        )
    if bits is not None and bits not in WIDTHS:
        raise RecipeError(
            f"Invalid bits={bits}: integers have {', '.join(map(str, WIDTHS))} bits",
            hint="Use one of these",
            code="invalid-bits",
        )
    if not isinstance(calib, Calibration):
        calib = Calibration(calib, images=256)
    opened = open_model(
        model,
        weights=weights,
        reading=reading,
        model_args=model_args,
        preprocess=preprocess,
        seed=seed,
    )
    with calibration_samples(opened.model, calib, opened.source) as data:
        rows, statistics = _sensed(
            opened.model, calib, data, _replacement(keep, bits),
            batch_size if measure else None, on_measured,
        )  # fmt: skip
    spec = model if isinstance(model, str) else ""
    seconds = time.perf_counter() - start
    kept = keep if bits is None else 1.0
    return Sensitivity(
        spec, kept, bits, statistics.images, statistics.skipped, tuple(rows), seconds
    )  # fmt: skip


@dataclass(frozen=True)
class Replacement:
    """What replaces a matrix.

    Args:
        of: makes it from the matrix and its metric: `(out, in)`.
        cost: predicts its KL divergence without making it, for each image; None where only what
            was made has a cost.
        rank: for the shape of a matrix; None where it is rounded.
        bits: of each number.
    """

    of: Callable[[Tensor, KfacMetric], Tensor]
    cost: Callable[[Tensor, KfacMetric], float] | None
    rank: Callable[[int, int], int] | None
    bits: float


def _replacement(keep: float, bits: int | None) -> Replacement:
    def rank(out: int, inputs: int) -> int:
        return max(1, int(keep * out * inputs / (out + inputs)))

    def thin(matrix: Tensor, metric: KfacMetric) -> Tensor:
        b, a = metric.truncate(matrix, rank(*matrix.shape))
        return b @ a

    def cost_of_thin(matrix: Tensor, metric: KfacMetric) -> float:
        values = spectrum(metric.whiten(matrix))
        return 0.5 * float(values[rank(*matrix.shape) :].square().sum())

    if bits is None:
        return Replacement(thin, cost_of_thin, rank, FLOAT_BITS)
    return Replacement(lambda w, metric: Rounding(w, metric).to_bits(bits).matrix, None, None, bits)


def _sensed(
    network: nn.Module,
    calib: Calibration,
    data: Dataset[Any],
    replacement: Replacement,
    batch_size: int | None,
    on_measured: OnImages | None,
) -> tuple[list[Sensed], KfacStatistics]:
    """A row for each matrix, measured too if there is a batch size, and the statistics."""
    places = matrices_of(inspect_model(network))
    tensors = {n: t.detach() for n, t in state_tensors(network).items()}
    statistics = calib.measure(network, {p.slot.tensor: p.slot.transposed for p in places}, data)
    rows: list[Sensed] = []
    others: list[Tensor] = []
    for place in places:
        matrix, metric = _matrix(place, tensors), _metric(place, statistics)
        other: Tensor | None = None
        if batch_size is not None or replacement.cost is None:
            other = replacement.of(matrix, metric or IDENTITY)
        if batch_size is not None and other is not None:
            others.append(other)
        rows.append(_predicted(place, matrix, metric, replacement, other))
    if batch_size is None:
        return rows, statistics
    meter = _Meter(copy.deepcopy(network), [p.slot for p in places], others, calib)
    found = meter.run(data, batch_size, on_measured)
    measured = [
        dataclasses.replace(r, measured=kl, changed=changed)
        for r, (kl, changed) in zip(rows, found, strict=True)
    ]
    return measured, statistics


@dataclass(frozen=True)
class Place:
    """Where a matrix is: its layer, its role there, and the slot."""

    layer: str
    role: str
    slot: Slot


def matrices_of(info: ModelInfo) -> list[Place]:
    """The matrices of a model's blocks, in its own order; a fused qkv is one.

    Raises:
        NothingToConvert: there is none.
    """
    order = {name: i for i, name in enumerate(info.shapes)}
    found: list[Place] = []
    for _, block in info.blocks:
        layer, inside = _split(block.name, block.stack)
        for role, slot in fuse(mixing_slots(block)).items():
            found.append(Place(layer, f"{inside}{role}", slot))
    if not found:
        raise NothingToConvert(
            "No block of this model is known",
            "There is no matrix to measure",
            "Write a family for it (docs/extending.md)",
            code="no-block-known",
        )
    return sorted(found, key=lambda p: (order[p.slot.tensor], p.slot.start))


def _split(name: str, stack: str) -> tuple[str, str]:
    """`blocks.3.attn` of the stack `blocks.*.attn` to `blocks.3` and `attn.`."""
    tail = stack.rpartition("*")[2]
    if "*" not in stack or not tail.startswith(".") or not name.endswith(tail):
        return name, ""
    return name.removesuffix(tail), f"{tail[1:]}."


def _matrix(place: Place, tensors: Mapping[str, Tensor]) -> Tensor:
    return place.slot.matrix_of(tensors[place.slot.tensor]).float()


def _metric(place: Place, statistics: KfacStatistics) -> KfacMetric | None:
    known = place.slot.tensor in statistics.metrics
    return metrics_of([Member(place.slot)], statistics.metrics)[0] if known else None


def _predicted(
    place: Place,
    matrix: Tensor,
    metric: KfacMetric | None,
    replacement: Replacement,
    other: Tensor | None,
) -> Sensed:
    """The row of a matrix; of one that no image reached without a cost."""
    out, inputs = matrix.shape
    rank = None if replacement.rank is None else replacement.rank(out, inputs)
    cost = None
    if metric is not None and replacement.cost is not None:
        cost = replacement.cost(matrix, metric)
    elif metric is not None and other is not None:
        cost = metric.cost(matrix - other)
    return Sensed(
        f"{place.layer}.{place.role}", place.layer, place.role, place.slot.tensor,
        out * inputs, rank, out * inputs if rank is None else rank * (out + inputs),
        replacement.bits, cost,
    )  # fmt: skip


class _Meter:
    """Runs images through a model as it is, and with each matrix in turn replaced."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        others: Sequence[Tensor],
        calib: Calibration,
    ) -> None:
        self._model, self._slots, self._others, self._calib = model, slots, others, calib
        self._placement = Placement.choose(model, pick_device(calib.device), "off")
        self._parameters = dict(model.named_parameters())

    @torch.no_grad()
    def run(
        self, data: Dataset[Any], batch_size: int, on_images: OnImages | None
    ) -> list[tuple[float, float]]:
        """Mean KL(original || changed), and the share of changed first answers, for each."""
        self._placement.place(self._model)
        device = self._placement.device
        loader = Loader(data, batch_size, workers=self._calib.workers, device=device)
        sums = torch.zeros(len(self._slots), 2, dtype=torch.float64)
        images = 0
        try:
            with modes_kept(self._model):
                self._model.eval()
                for batch in loader.epoch():
                    if len(batch.images):
                        images += len(batch.images)
                        sums += self._batch(self._placement.images(batch.images))
                    if on_images is not None:
                        on_images(images, loader.images)
        finally:
            loader.close()
        return [(max(0.0, kl), changed) for kl, changed in (sums / images).tolist()]

    def _batch(self, images: Tensor) -> Tensor:
        # All matrices for one batch, so that images are decoded once and never kept.
        right = checked_forward(self._model, images)
        kind = kind_of(right, self._model)
        found = torch.zeros(len(self._slots), 2, dtype=torch.float64)
        for i, slot in enumerate(self._slots):
            with self._replaced(slot, self._others[i]):
                wrong = self._model(images)
            found[i, 0] = kind.divergence(wrong, right, self._model)
            found[i, 1] = (1 - kind.agreement(wrong, right, self._model)).sum()
        return found

    @contextmanager
    def _replaced(self, slot: Slot, other: Tensor) -> Iterator[None]:
        parameter = self._parameters[slot.tensor]
        before = parameter.data
        changed = before.clone(memory_format=torch.contiguous_format)
        slot.matrix_of(changed).copy_(other.to(changed.device))
        # Through .data: whoever shares the Parameter sees the change too.
        parameter.data = changed
        try:
            yield
        finally:
            parameter.data = before
