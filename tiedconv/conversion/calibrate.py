"""Calibration of a conversion: what errors cost on images, and the fit of each block to them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tiedconv.calibration import (
    BlockwiseResult,
    CalibConfig,
    CalibEvent,
    KfacStatistics,
    fit_blocks,
    gather_statistics,
    measure_agreement,
)
from tiedconv.data import ImageList, eval_transform, open_unlabelled
from tiedconv.data.layouts import layout_of
from tiedconv.io.run_dir import RunDir
from tiedconv.runtime.call_hooks import Pick
from tiedconv.sources import Preprocess, Source

Images = str | Path | Tensor | Dataset[Any] | DataLoader[Any]
"""A folder of images; or a tensor, a data set or a loader of one, prepared as the model wants."""

STAND_IN_RIDGE = 0.3
"""The least ridge of second moments that are measured on random images: photos use more directions
than these do."""

MEASURED_AT_ONCE = 32
"""Images, at most: more take memory, and the time of each stays."""


@dataclass(frozen=True)
class Measuring:
    """KfacStatistics are being measured: images done, images in all."""

    images: int
    total: int


@dataclass(frozen=True)
class ResumedFits:
    """So many fits were restored from an interrupted run; nothing is measured."""

    count: int


@dataclass(frozen=True)
class CandidateStarted:
    """The calibration of one of several fits starts; their predicted costs are nearly the same.

    Args:
        number: of this fit, from 1.
        count: of the fits.
        schemes: that it uses.
    """

    number: int
    count: int
    schemes: tuple[str, ...]


@dataclass(frozen=True)
class CandidateChosen:
    """The best of several calibrated fits was chosen.

    Args:
        number: of that fit, from 1.
        divergences: of each, KL divergence of the outputs in nats for each image.
    """

    number: int
    divergences: tuple[float, ...]


@dataclass(frozen=True)
class DrawnText:
    """The model reads text beside images, and there are only images: text is drawn at random."""


Event = CalibEvent | DrawnText | Measuring | ResumedFits | CandidateStarted | CandidateChosen
OnCalibration = Callable[[Event], None]


def _ignore(event: Event) -> None:
    """No-op callback."""


class _InMemory(Dataset[Any]):
    """The entries of a tensor, `(images, ...)`."""

    in_memory = True

    def __init__(self, images: Tensor) -> None:
        self._images = images.detach().cpu()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


@dataclass(frozen=True)
class Calibration:
    """Images to convert by; labels are never looked at.

    Args:
        data: a folder of images, or "random" for shapes at random; a tensor or a data set,
            prepared as the model wants: of images, of (image, label), or of dicts whose keys are
            arguments of the model (`pixel_values`, `input_ids`).
        images: at most so many are used.
        config: effort, seed and the rest.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.
        strict: a broken image is an error rather than skipped.
        run_dir: where an interrupted calibration is kept.
        resume: go on with one.
        on_event: called with progress.
        output: what of the model's output is compared: a name, such as `last_hidden_state`, names,
            or a function of the whole (a dict that it returns is features by name, a tensor
            `(B, n)` class logits); None for all that the model returns.
    """

    data: Images
    images: int = 1024
    config: CalibConfig = field(default_factory=CalibConfig)
    device: str = "auto"
    workers: int | None = None
    strict: bool = False
    run_dir: Path | None = None
    resume: bool = False
    on_event: OnCalibration = _ignore
    output: Pick | None = None

    @property
    def stands_in(self) -> bool:
        """Whether the images stand in for those that the model will see."""
        return isinstance(self.data, str | Path) and layout_of(str(self.data)).stands_in

    def part(self, index: int, count: int) -> Calibration:
        """The same for one of several models, with a folder of its own for what is kept."""
        place = None if self.run_dir is None else RunDir(self.run_dir).part(index, count)
        return dataclasses.replace(self, run_dir=place)

    def open(self, source: Source, native: tuple[int, int] | None = None) -> Dataset[Any]:
        """The images as the model wants them.

        Args:
            source: says how they are prepared, if anything does.
            native: height and width that the model was built for, where the source says nothing.

        Raises:
            DataError: a folder without images.
        """
        if isinstance(self.data, DataLoader):
            return self.data.dataset
        if isinstance(self.data, Tensor):
            return _InMemory(self.data)
        if not isinstance(self.data, str | Path):
            return self.data
        wanted = source.preprocess or Preprocess(224 if native is None else min(native))
        spec = str(self.data)
        spec = layout_of(spec).at_size(spec, wanted.resize or wanted.size)
        found = open_unlabelled(spec, count=self.images, seed=self.config.seed)
        return ImageList(
            found,
            eval_transform(wanted),
            strict=self.strict,
            channels=wanted.channel_count(),
            exif=wanted.exif,
        )

    def measure(
        self,
        model: nn.Module,
        weights: Mapping[str, bool],
        data: Dataset[Any],
        moved: Mapping[str, Tensor] | None = None,
    ) -> KfacStatistics:
        """What errors of these weights cost (`tiedconv.numerics.kfac_metric`); the model stays.

        Args:
            model: plain.
            weights: tensor names, and whether each is stored as `(in, out)`.
            data: from `open`.
            moved: tensors to measure with in place of the model's own.
        """
        # A copy, as placing a model on a device or in another layout gives it new tensors.
        probe = copy.deepcopy(model)
        probe.load_state_dict(moved or {}, strict=False)
        return gather_statistics(
            probe,
            weights,
            data,
            batch_size=min(MEASURED_AT_ONCE, self.config.batch_size),
            seed=self.config.seed,
            device=self.device,
            workers=self.workers,
            least_ridge=STAND_IN_RIDGE if self.stands_in else 0.0,
            on_images=lambda done, total: self.on_event(Measuring(done, total)),
        )

    def fit(self, student: nn.Module, teacher: nn.Module, data: Dataset[Any]) -> BlockwiseResult:
        """Fit each block of the student to the teacher's; see `calibration.fit_blocks`."""
        return fit_blocks(
            student,
            teacher,
            data,
            self.config,
            device=self.device,
            workers=self.workers,
            checkpoint_dir=self.run_dir,
            resume=self.resume,
            on_event=self.on_event,
        )


def calibration_record(
    ridge: float | None,
    result: BlockwiseResult,
    what: Calibration,
    model: nn.Module,
    original: nn.Module,
) -> dict[str, Any]:
    """What a file's history says of a calibration.

    Args:
        ridge: the median of the metrics'.
        result: of the calibration.
        what: was asked for.
        model: as it is written.
        original: a copy from before.
    """
    agreement = dataclasses.asdict(measure_agreement(model, original, result.held_batches))
    return {
        "images": result.images,
        "skipped": result.skipped,
        "effort": what.config.effort,
        "seed": what.config.seed,
        **({"random": True} if what.stands_in else {}),
        "ridge_median": ridge,
        "kl_before": result.kl_before,
        # Of the model as it is written: its floats may have been rounded since the fit.
        "kl_after": agreement.pop("divergence"),
        "agreement": agreement,
        "blocks": [[list(s.units), s.before, s.after] for s in result.spans],
    }
