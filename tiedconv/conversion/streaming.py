"""Conversion of a model that need not fit into memory.

Weights are read from their files when they are asked for. What the moves before a fit change, and
the factors that fits make, wait in a scratch file beside the output. In memory are the few
matrices that are worked on, and the factors of one group. The arithmetic is that of `trials`, so
the result is the same, byte for byte.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from torch import Tensor, nn

from tiedconv.conversion.candidates import OnGroup, tried
from tiedconv.core.plan import Group, Member, Plan, Slot, Span
from tiedconv.errors import OutputError
from tiedconv.families.inspect import ModelInfo
from tiedconv.io.tensor_scratch import StoredTensor, TensorScratch
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.planning.planner import alternatives, fit_group, plan_on, widened, working
from tiedconv.planning.recipe import Recipe
from tiedconv.runtime.tie import tie
from tiedconv.sources import LazyWeights

RESIDENT = 64 * 2**20
"""Bytes of the matrices of one group up to which they stay in memory while it is fitted. Those of
a larger group are read anew for each pass over them."""
_M_MMAP_THRESHOLD = -3  # as malloc.h numbers it
LARGE = 2**30
"""Bytes of weights from which on freed memory is given back at once."""


@dataclass(frozen=True)
class StreamedFit:
    """A recipe carried out, its tensors on disk.

    Args:
        recipe: which of the alternatives it is.
        plan: with the relative error of each group.
        cost: of all errors together.
        moved: the kept tensors.
        factors: stored factor name to its spot in `scratch`.
        scratch: holds the factors, and what was moved.
    """

    recipe: Recipe
    plan: Plan
    cost: float
    moved: _Moved
    factors: Mapping[str, StoredTensor]
    scratch: TensorScratch

    def tensor(self, name: str) -> Tensor:
        """A kept tensor, or a factor by its stored name."""
        spot = self.factors.get(name)
        return self.moved.final(name) if spot is None else self.scratch.read(spot)


@contextmanager
def streamed(
    model: nn.Module,
    info: ModelInfo,
    tensors: LazyWeights,
    recipe: Recipe,
    output: Path,
    on_group: OnGroup | None = None,
) -> Iterator[StreamedFit]:
    """The best fit of a recipe and of what its scheme wants tried beside it.

    Args:
        model: of the weights, as `sources.open_lazily` gives it; it is tied as a check.
        info: of the model.
        tensors: the weights.
        recipe: what is wanted.
        output: the file to be; beside it must be space for the moved weights and the factors.
        on_group: called with (groups fitted, groups in all).

    Raises:
        NothingToConvert, BudgetError: no recipe can be carried out.
        OutputError: there is no space.
        WeightsError: the weights changed in the meantime.
    """
    if sum(math.prod(s) * tensors.dtypes[n].itemsize for n, s in info.shapes.items()) > LARGE:
        _give_back_freed_memory()
    best: StreamedFit | None = None
    work = _Work(info, tensors, output, on_group)
    try:
        for found in tried(alternatives(recipe), work.fit):
            if best is not None and best.cost <= found.cost:
                found.scratch.close()
                continue
            if best is not None:
                best.scratch.close()
            best = found
        assert best is not None
        empty = {name: torch.empty(s, device="meta") for name, s in best.plan.factors.items()}
        tie(model, best.plan, empty)  # refuses what can't be bound, as it would later
        with _on_disk_of(output):
            yield best
    finally:
        if best is not None:
            best.scratch.close()


@dataclass(frozen=True)
class _Work:
    """What every recipe that is tried on a model has in common."""

    info: ModelInfo
    tensors: LazyWeights
    output: Path
    on_group: OnGroup | None

    @torch.no_grad()
    def fit(self, recipe: Recipe) -> StreamedFit:
        """The recipe carried out; raises what the planner raises."""
        with _on_disk_of(self.output), ExitStack() as opened:
            found = self._fit(recipe, opened.enter_context(TensorScratch(self.output.parent)))
            opened.pop_all()  # it stays open
            return found

    def _fit(self, recipe: Recipe, scratch: TensorScratch) -> StreamedFit:
        moved = _Moved(self.tensors, scratch)
        plan = plan_on(self.info, recipe, _StreamedEditor(moved))
        factors: dict[str, StoredTensor] = {}
        groups: list[Group] = []
        cost = 0.0
        for i, group in enumerate(plan.groups):
            matrices = _Matrices(group.members, moved.final, working)
            done, fitted, wrong = fit_group(group, matrices)
            groups.append(done)
            cost += wrong
            dtype = self.tensors.dtypes[group.members[0].slot.tensor]
            for name in list(fitted):  # each is freed once written: the next group needs the room
                spot = scratch.put(fitted.pop(name).to(dtype))
                factors[group.stored_name(name)] = spot
            if self.on_group is not None:
                self.on_group(i + 1, len(plan.groups))
        plan = dataclasses.replace(plan, groups=tuple(groups))
        return StreamedFit(recipe, plan, cost, moved, factors, scratch)


@dataclass
class _Moved:
    """Weights as the moves left them: what was edited from the scratch, the rest from files."""

    tensors: LazyWeights
    scratch: TensorScratch
    edited: dict[str, StoredTensor] = field(default_factory=dict)

    def wide(self, name: str) -> Tensor:
        """A tensor in the precision that moves are made in, to read."""
        spot = self.edited.get(name)
        return widened(self.tensors[name]) if spot is None else self.scratch.read(spot)

    def final(self, name: str) -> Tensor:
        """A tensor in the model's precision, to read."""
        return self.wide(name).to(self.tensors.dtypes[name])

    def writable(self, name: str) -> Tensor:
        """A tensor in the precision that moves are made in; what is written to it stays."""
        if name not in self.edited:
            self.edited[name] = self.scratch.put(self.wide(name))
        return self.scratch.writable(self.edited[name])


class _StreamedEditor(WeightEditor):
    """A workbench whose tensors are on disk."""

    def __init__(self, moved: _Moved) -> None:
        super().__init__({})
        self._moved = moved

    def matrix(self, slot: Slot) -> Tensor:
        return slot.matrix_of(self._moved.wide(slot.tensor))

    def matrices(self, members: Sequence[Member]) -> Sequence[Tensor]:
        return _Matrices(members, self._moved.wide, Tensor.float)

    def edit(self, place: Slot | Span) -> Tensor:
        tensor = self._moved.writable(place.tensor)
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


def _give_back_freed_memory() -> None:
    """Let the C library return each freed matrix to the system, for the rest of the process.

    By default glibc keeps freed blocks of up to 32 MB for later. The factors that a fit makes one
    after the other come to lie between them, and hundreds of MB are never given back. Asking the
    system each time costs about a tenth of the time.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, 2**20)


@contextmanager
def _on_disk_of(output: Path) -> Iterator[None]:
    """Within it, a scratch file that can't be written is told as an output that can't."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"There is no room to work beside {output} ({error.strerror or error})",
            "A conversion keeps its intermediate results there",
            "Free some space, about as much as the weights take, or choose another place with -o",
        ) from None
