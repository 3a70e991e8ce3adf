"""Conversion of a model that need not fit into memory: the tensor store on disk.

Weights are read from their files when they are asked for. What aligning changes, and the factors
that fits make, are kept in a scratch file beside the output. In memory are the few matrices that
are worked on, and the factors of one group. The stages are those of every conversion
(`conversion.pipeline`), so the file is the same, byte for byte.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from torch import Tensor

from tiedconv.conversion.tensor_store import TensorStore, Workspace, widened, working
from tiedconv.core.plan import Member, Plan, Slot, Span
from tiedconv.errors import OutputError
from tiedconv.io.tensor_scratch import StoredTensor, TensorScratch
from tiedconv.numerics.symmetries import Allows, WeightEditor
from tiedconv.sources import LazyWeights

LARGE = 2**30
"""Bytes of weights from which `return_freed_memory` is worth its time."""
RESIDENT = 64 * 2**20
"""Bytes of the matrices of one group up to which they stay in memory while it is fitted. Those of
a larger group are read again for each pass over them."""
_M_MMAP_THRESHOLD = -3  # as malloc.h numbers it


class StreamedStore(TensorStore):
    """Weights that stay in their files.

    Args:
        tensors: the weights.
        folder: on whose disk the scratch files lie; it needs space for the aligned weights and
            the factors.
        allows: which symmetries may be applied; None for all.
    """

    def __init__(self, tensors: LazyWeights, folder: Path, allows: Allows | None = None) -> None:
        self._tensors, self._folder, self._allows = tensors, folder, allows

    def open(self) -> Workspace:
        return _OnDisk(self._tensors, TensorScratch(self._folder), self._allows)


class _OnDisk(Workspace):
    """What aligning changed is read from the scratch file, the rest from the weights' files."""

    def __init__(self, tensors: LazyWeights, scratch: TensorScratch, allows: Allows | None) -> None:
        self.dtypes = tensors.dtypes
        self.editor = _DiskEditor(self, allows)
        self._tensors, self.scratch = tensors, scratch
        self.edited: dict[str, StoredTensor] = {}
        self._factors: dict[str, StoredTensor] = {}

    def wide(self, name: str) -> Tensor:
        """A tensor in the precision that weights are aligned in; not to be changed."""
        place = self.edited.get(name)
        return widened(self._tensors[name]) if place is None else self.scratch.read(place)

    def aligned(self, name: str) -> Tensor:
        return self.wide(name).to(self.dtypes[name])

    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        return _Matrices(members, self.aligned, working)

    def keep(self, name: str, factor: Tensor) -> None:
        self._factors[name] = self.scratch.put(factor)

    def fitted(self, plan: Plan) -> Mapping[str, Tensor]:
        return _Fitted(self, plan)

    def tensor(self, name: str) -> Tensor:
        """A kept tensor, or a factor by its stored name."""
        place = self._factors.get(name)
        return self.aligned(name) if place is None else self.scratch.read(place)

    def close(self) -> None:
        self.scratch.close()


class _Fitted(Mapping[str, Tensor]):
    """Kept tensors and factors, each read when it is asked for."""

    def __init__(self, workspace: _OnDisk, plan: Plan) -> None:
        self._workspace, self._names = workspace, tuple(plan.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._workspace.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _DiskEditor(WeightEditor):
    """An editor whose tensors are on disk."""

    def __init__(self, workspace: _OnDisk, allows: Allows | None) -> None:
        super().__init__({}, allows=allows)
        self._workspace = workspace

    def matrix(self, slot: Slot) -> Tensor:
        return slot.matrix_of(self._workspace.wide(slot.tensor))

    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        return _Matrices(members, self._workspace.wide, Tensor.float)

    def edit(self, place: Slot | Span) -> Tensor:
        name, space = place.tensor, self._workspace
        if name not in space.edited:
            space.edited[name] = space.scratch.put(space.wide(name))
            self.edited.add(name)
        tensor = space.scratch.writable(space.edited[name])
        return place.matrix_of(tensor) if isinstance(place, Slot) else place.of(tensor)


class _Matrices(Sequence[Tensor]):
    """The matrices of a group, each read when it is asked for."""

    def __init__(
        self,
        members: Sequence[Member],
        tensor: Callable[[str], Tensor],
        precision: Callable[[Tensor], Tensor],
    ) -> None:
        self._members, self._tensor, self._precision = members, tensor, precision
        self._keep = 4 * sum(m.slot.numel for m in members) <= RESIDENT
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Matrices(self._members[index], self._tensor, self._precision)
        member = self._members[index]
        index %= len(self._members)
        if index not in self._kept:
            matrix = self._precision(member.matrix_of(self._tensor(member.slot.tensor)))
            if not self._keep:
                return matrix
            self._kept[index] = matrix
        return self._kept[index]


def return_freed_memory() -> None:
    """Let the C library return each freed matrix to the system, for the rest of the process.

    By default glibc keeps freed blocks of up to 32 MB. The factors that a fit makes one after the
    other come to lie between them, and hundreds of MB are never returned. Asking the system each
    time costs about a tenth of the time. It changes the whole process, so only the command line
    calls it, never the library.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 2**20)


@contextmanager
def scratch_errors(output: Path) -> Iterator[None]:
    """Within it, an OSError of a scratch file is reported as an output that can't be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"There is no space for temporary files beside {output} ({error.strerror or error})",
            "A conversion keeps its intermediate results there",
            "Free some space, about as much as the weights take, or choose another path with -o",
            code="scratch-full",
        ) from None
