"""In what the samples of a calibration differ: their shapes, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tiedconv.data.grouping import Indices, consecutive
from tiedconv.runtime.sample_table import SampleTable, table_of


@dataclass(frozen=True)
class Forms:
    """Of samples that have one shape, all of whose tokens count, unless it says something else.

    Attributes:
        groups: see `data.grouping`; one for each of `numbers`.
        numbers: of the samples in the table, `(samples, 1)`.
        table: gives a model the samples.
    """

    groups: Indices | None = None
    numbers: Tensor | None = None
    table: SampleTable | None = None

    @classmethod
    def of(cls, model: nn.Module, images: Tensor, groups: Indices | None) -> Forms:
        """What the hooks of a model know of samples.

        Args:
            model: with its hooks.
            images: what it is called with, all of it.
            groups: of all samples of the data set.
        """
        table = table_of(model)
        if table is None:
            return cls()
        return cls(None if groups is None else groups[images.flatten().numpy()], images, table)

    def batches(self, index: Tensor, size: int) -> list[Tensor]:
        """Consecutive parts of indices, at most `size` each, each of samples of one shape."""
        groups = None if self.groups is None else self.groups[index.numpy()]
        parts = consecutive(np.arange(len(index)), size, groups)
        return [index[torch.from_numpy(part)] for part in parts]

    def without_padding(self, outputs: Sequence[Tensor], index: Tensor) -> list[Tensor]:
        """Outputs of modules, those of tokens that are padding set to zero.

        Args:
            outputs: `(B, ...)` each; only those `(B, tokens, ...)` change.
            index: of the samples.
        """
        kept = None
        if self.table is not None and self.numbers is not None:
            kept = self.table.kept_of(self.numbers[index])
        return [output if kept is None else _masked(output, kept) for output in outputs]


ALIKE = Forms()


def _masked(output: Tensor, kept: Tensor) -> Tensor:
    if output.ndim < 3 or output.shape[:2] != kept.shape:
        return output
    dropped = ~kept.to(output.device).reshape(*kept.shape, *[1] * (output.ndim - 2))
    return output.masked_fill(dropped, 0.0)
