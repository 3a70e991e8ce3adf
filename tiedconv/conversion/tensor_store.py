"""Where a conversion reads weights and keeps factors: in memory, or on disk.

A `TensorStore` holds the weights of one model. For each recipe that is tried it opens a
`Workspace`, in which the weights are aligned and the factors of each group are kept. The stages
of `conversion.pipeline` know nothing else of where tensors are. `conversion.streaming` has the
store whose tensors stay on disk.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.plan import Member, Plan
from tiedconv.numerics.symmetries import Allows, WeightEditor


class Workspace(ABC):
    """The weights of a model for one recipe.

    Attributes:
        editor: through which the weights are aligned.
        dtypes: of each weight, as the model has it.
    """

    editor: WeightEditor
    dtypes: Mapping[str, torch.dtype]

    @abstractmethod
    def aligned(self, name: str) -> Tensor:
        """A weight as aligned so far, in the model's dtype; not to be changed."""

    @abstractmethod
    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        """The aligned matrices of a group, `(out, in)`, in working precision."""

    @abstractmethod
    def keep(self, name: str, factor: Tensor) -> None:
        """Keep a factor, in memory of its own, under its stored name."""

    @abstractmethod
    def fitted(self, plan: Plan) -> Mapping[str, Tensor]:
        """The kept tensors and factors of a plan, once all groups are fitted."""

    @abstractmethod
    def close(self) -> None:
        """Free what the tensors are kept in."""

    def digest(self) -> str:
        """SHA-256 of the weights that aligning changed: equal for workspaces aligned alike."""
        digest = hashlib.sha256()
        for name in sorted(self.editor.edited):
            digest.update(name.encode())
            raw = self.aligned(name).cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().data)
        return digest.hexdigest()


class TensorStore(ABC):
    """The weights of one model."""

    @abstractmethod
    def open(self) -> Workspace:
        """A workspace in which the weights are as the model has them."""


class MemoryStore(TensorStore):
    """Weights in memory.

    Args:
        tensors: name to tensor.
        in_place: align contiguous tensors themselves, which saves their size in memory; only one
            workspace may be opened then.
        allows: which symmetries may be applied; None for all.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        in_place: bool = False,
        allows: Allows | None = None,
    ) -> None:
        self._tensors, self._in_place, self._allows = tensors, in_place, allows

    def open(self) -> Workspace:
        return _InMemory(self._tensors, self._in_place, self._allows)


class _InMemory(Workspace):
    def __init__(
        self, tensors: Mapping[str, Tensor], in_place: bool, allows: Allows | None
    ) -> None:
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        wide = {name: widened(tensor) for name, tensor in tensors.items()}
        self.editor = WeightEditor(wide, in_place=in_place, allows=allows)
        self._factors: dict[str, Tensor] = {}

    def aligned(self, name: str) -> Tensor:
        return self.editor.tensors[name].to(self.dtypes[name])

    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        return [working(m.matrix_of(self.aligned(m.slot.tensor))) for m in members]

    def keep(self, name: str, factor: Tensor) -> None:
        # A factor is neither a weight itself nor part of one.
        self._factors[name] = factor.clone(memory_format=torch.contiguous_format)

    def fitted(self, plan: Plan) -> Mapping[str, Tensor]:
        found = {name: self.aligned(name) for name in plan.kept}
        found |= {name: self._factors[name] for name in plan.factors}
        self.close()
        return found

    def close(self) -> None:
        self.editor = WeightEditor({})  # the aligned weights that the factors replace
        self._factors = {}


def working(matrix: Tensor) -> Tensor:
    """A matrix in the precision that fits work in: float32, or float64 if it is that."""
    matrix = matrix.detach()
    # Contiguous, as a fit passes over it many times.
    return (matrix if matrix.dtype == torch.float64 else matrix.float()).contiguous()


def widened(tensor: Tensor) -> Tensor:
    """A tensor in the precision that weights are aligned in: float32 at least."""
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.detach().float() if half else tensor
