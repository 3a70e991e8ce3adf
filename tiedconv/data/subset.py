"""Some samples of a data set, read as the whole is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from tiedconv.data.grouping import Indices, numbered
from tiedconv.data.normalize import Normalization, as_uint8


class Subset(Dataset[Any]):
    """Some samples of a data set, in the order of their indices.

    Unlike PyTorch's class of this name it keeps the groups of samples (`data.grouping`), and gives
    bytes where the whole does.

    Args:
        dataset: of any kind that `Loader` reads.
        indices: of the samples, `(n,)` int64.

    Attributes:
        groups: of these samples; None if the whole has none.
    """

    def __init__(self, dataset: Dataset[Any], indices: Tensor) -> None:
        self.dataset, self._indices = dataset, indices
        groups: Indices | None = getattr(dataset, "groups", None)
        self.groups = None if groups is None else numbered(groups[indices.numpy()].tolist())

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self._indices[index])]

    def as_uint8(self) -> tuple[Subset, Normalization] | None:
        """The same samples as bytes, where the whole gives bytes."""
        whole, normalization = as_uint8(self.dataset)
        return None if normalization is None else (Subset(whole, self._indices), normalization)
