"""What is measured of a model on images: statistics of activations and gradients, and outputs.

The statistics are kept for the last alignment of the weights. Outputs are compared on other images
too, as what was fitted to few images is near on these alone (see `calibration.held_out`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.calibration import KfacStatistics
from tiedconv.calibration.held_out import split
from tiedconv.calibration.output_divergence import OutputDivergence
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.tensor_store import Workspace
from tiedconv.data import Subset

BATCHES = 8
"""That the images on which outputs are compared are divided into, at least."""


class StatisticsCache:
    """Measures statistics, and keeps one set of them.

    A set may take more memory than the model (about 1.3 GB for ViT-B/16), so only that of the last
    alignment is kept: recipes that align alike should follow each other (`by_alignment`). Whether
    two align alike is decided by the aligned weights themselves.

    Args:
        model: plain; it must stay as it is.
        calib: how images are read.
        data: the images.
        others: to compare outputs on; None to hold some of the images out of the statistics, and to
            compare outputs on all: on those held out alone, chance would decide.
    """

    def __init__(
        self,
        model: nn.Module,
        calib: Calibration,
        data: Dataset[object],
        others: Dataset[object] | None = None,
    ) -> None:
        self._model, self._calib = model, calib
        if others is not None:
            self._data, self._others = data, others
        else:
            train, held = split(len(data), calib.config.seed)  # type: ignore[arg-type]
            # Those held out first: of many images, not all are compared.
            first = torch.cat([held, train]) if len(data) > 1 else held  # type: ignore[arg-type]
            self._data, self._others = Subset(data, train), Subset(data, first)
        # Small batches, so that there are enough to tell a difference from chance.
        count = len(self._others)  # type: ignore[arg-type]
        self._outputs = OutputDivergence(
            model, self._others, batch_size=min(calib.config.batch_size, max(1, count // BATCHES)),
            device=calib.device, workers=calib.workers,
        )  # fmt: skip
        self._last: tuple[object, KfacStatistics] | None = None
        self.images = 0
        """Images that the last set was measured on."""
        self.skipped = 0
        """Images that could not be read."""

    def of(self, weights: Mapping[str, bool], workspace: Workspace) -> KfacStatistics:
        """The statistics of some weights.

        Args:
            weights: tensor names, and whether each is stored as `(in, out)`.
            workspace: with the weights as aligned.

        Raises:
            DataError: no image could be read.
        """
        key = (workspace.digest(), tuple(sorted(weights.items())))
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next set is measured: its memory is needed
            aligned = {name: workspace.aligned(name) for name in workspace.dtypes}
            found = self._calib.measure(self._model, weights, self._data, aligned)
            self.images, self.skipped = found.images, found.skipped
            self._last = key, found
        return self._last[1]

    def divergences(self, model: nn.Module) -> Tensor:
        """Divergences of a model's outputs from those of the plain one, for each batch."""
        return self._outputs.of(model)
