"""The verb `sensitivity`: what it costs to store each matrix of a model with fewer numbers.

For each matrix alone: the best low-rank approximation at a fraction of its parameters, in the
Fisher-weighted error (see `tiedconv.numerics.kfac_metric`). Its error, half the sum of the squared
singular values beyond the rank, predicts the KL divergence of the model's outputs from the
original's. Measured, the matrix is replaced, the images are run, and the outputs are compared.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import KfacStatistics
from tiedconv.conversion.calibrate import Calibration, Images
from tiedconv.conversion.sample_inputs import calibration_samples
from tiedconv.core.plan import Member, Slot
from tiedconv.core.units import matrices_of as mixing_slots
from tiedconv.data import Loader
from tiedconv.errors import NothingToConvert, UserError
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.linalg import spectrum
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
from tiedconv.utils.plotting import check_picture, new_figure, write_figure

DECADES = 3
"""Costs that the colours of a picture span."""

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
        rank: of its approximation.
        stored: parameters of that.
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
    rank: int
    stored: int
    predicted: float | None
    measured: float | None = None
    changed: float | None = None

    @property
    def per_million(self) -> float | None:
        """Nats for each million parameters saved: measured if it was, else predicted."""
        cost = self.predicted if self.measured is None else self.measured
        saved = self.parameters - self.stored
        return None if cost is None or saved < 1 else 1e6 * cost / saved


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found.

    Args:
        model: its spec.
        keep: the share of its parameters that each matrix keeps at most.
        images: that were used.
        skipped: that could not be read.
        rows: the matrices, in the model's own order.
        seconds: time taken.
    """

    model: str
    keep: float
    images: int
    skipped: int
    rows: tuple[Sensed, ...]
    seconds: float

    @property
    def by_price(self) -> tuple[str, ...]:
        """Names, the cheapest for each parameter saved first."""
        priced = [(r.per_million, r.name) for r in self.rows if r.per_million is not None]
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
        UserError: a model or a share that can't be used.
    """
    start = time.perf_counter()
    if not 0 < keep < 1:
        raise UserError(
            f"Invalid keep={keep:g}: it is not a fraction in (0, 1)",
            hint="Use a number above 0 and below 1, such as 0.5",
            code="keep-out-of-range",
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
            opened.model, calib, data, keep, batch_size if measure else None, on_measured
        )
    spec = model if isinstance(model, str) else ""
    seconds = time.perf_counter() - start
    return Sensitivity(spec, keep, statistics.images, statistics.skipped, tuple(rows), seconds)


def _sensed(
    network: nn.Module,
    calib: Calibration,
    data: Dataset[Any],
    keep: float,
    batch_size: int | None,
    on_measured: OnImages | None,
) -> tuple[list[Sensed], KfacStatistics]:
    """A row for each matrix, measured too if there is a batch size, and the statistics."""
    places = matrices_of(inspect_model(network))
    tensors = {n: t.detach() for n, t in state_tensors(network).items()}
    statistics = calib.measure(network, {p.slot.tensor: p.slot.transposed for p in places}, data)
    rows = [_predicted(p, _matrix(p, tensors), statistics, keep) for p in places]
    if batch_size is None:
        return rows, statistics
    thin = [
        (_metric(p, statistics) or IDENTITY).truncate(_matrix(p, tensors), r.rank)
        for p, r in zip(places, rows, strict=True)
    ]
    meter = _Meter(copy.deepcopy(network), [p.slot for p in places], thin, calib)
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


def _predicted(place: Place, matrix: Tensor, statistics: KfacStatistics, keep: float) -> Sensed:
    out, inputs = matrix.shape
    rank = max(1, int(keep * out * inputs / (out + inputs)))
    metric = _metric(place, statistics)
    cost = None
    if metric is not None:
        values = spectrum(metric.whiten(matrix))
        cost = 0.5 * float(values[rank:].square().sum())
    return Sensed(
        f"{place.layer}.{place.role}", place.layer, place.role, place.slot.tensor,
        out * inputs, rank, rank * (out + inputs), cost,
    )  # fmt: skip


class _Meter:
    """Runs images through a model as it is, and with each matrix in turn replaced."""

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Slot],
        thin: Sequence[tuple[Tensor, Tensor]],
        calib: Calibration,
    ) -> None:
        self._model, self._slots, self._thin, self._calib = model, slots, thin, calib
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
            with self._replaced(slot, self._thin[i]):
                wrong = self._model(images)
            found[i, 0] = kind.divergence(wrong, right, self._model)
            found[i, 1] = (1 - kind.agreement(wrong, right, self._model)).sum()
        return found

    @contextmanager
    def _replaced(self, slot: Slot, thin: tuple[Tensor, Tensor]) -> Iterator[None]:
        parameter = self._parameters[slot.tensor]
        before = parameter.data
        changed = before.clone(memory_format=torch.contiguous_format)
        b, a = (part.to(changed.device) for part in thin)
        slot.matrix_of(changed).copy_(b @ a)
        # Through .data: whoever shares the Parameter sees the change too.
        parameter.data = changed
        try:
            yield
        finally:
            parameter.data = before


def draw(found: Sensitivity, path: Path, *, force: bool = False) -> None:
    """A heat map, layers by roles: divergences, and what a million parameters saved costs.

    Args:
        found: from `sensitivity`.
        path: of the picture; its name says the kind: .png, .svg or .pdf.
        force: replace an existing file.

    Raises:
        MissingExtra: matplotlib is not installed.
        OutputError: the file can't be written.
    """
    check_picture(path, force=force)
    panels = {"predicted, nats for each image": [r.predicted for r in found.rows]}
    if any(r.measured is not None for r in found.rows):
        panels["measured, nats for each image"] = [r.measured for r in found.rows]
    panels["nats for each million parameters saved"] = [r.per_million for r in found.rows]
    layers = list(dict.fromkeys(r.layer for r in found.rows))
    roles = list(dict.fromkeys(r.role for r in found.rows))
    width, height = max(2.6, 0.85 * len(roles)), max(2.0, 0.32 * len(layers))
    figure = new_figure(1.8 + len(panels) * width, 2.0 + height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        _heat(axis, title, _grid(found.rows, values, layers, roles), roles)
    axes[0].set_yticks(range(len(layers)), _short(layers), fontsize=8)
    figure.suptitle(f"{found.model}: one matrix at a time at {100 * found.keep:g} %", fontsize=10)
    write_figure(figure, path, force=force)


def _grid(
    rows: Sequence[Sensed], values: Sequence[float | None], layers: list[str], roles: list[str]
) -> Tensor:  # fmt: skip
    grid = torch.full((len(layers), len(roles)), torch.nan, dtype=torch.float64)
    for row, value in zip(rows, values, strict=True):
        if value is not None:
            grid[layers.index(row.layer), roles.index(row.role)] = value
    return grid


def _heat(axis: Any, title: str, grid: Tensor, roles: Sequence[str]) -> None:
    """One panel; colours are logarithmic, as costs differ by orders of magnitude."""
    known = grid[grid > 0].log10()
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)
    low = max(low, high - DECADES)  # what costs less than that is all alike
    shown = (grid.log10().clamp(min=low) - low) / (high - low or 1.0)
    axis.imshow(shown.numpy(), aspect="auto", cmap="YlOrRd", vmin=0, vmax=1)
    for i, j in (~grid.isnan()).nonzero().tolist():
        colour = "white" if shown[i, j] > 0.65 else "black"
        text = f"{float(grid[i, j]):.2g}"
        axis.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    axis.set_title(title, fontsize=9)
    axis.set_xticks(range(len(roles)), roles, rotation=30, ha="right", fontsize=8)
    axis.tick_params(length=0)


def _short(layers: Sequence[str]) -> list[str]:
    """The names without a start that all share and that is long."""
    start = re.match(r"(.*\.)?", layers[0])
    head = start[0] if start else ""
    return [n.removeprefix(head) for n in layers] if len(head) > 15 else list(layers)
