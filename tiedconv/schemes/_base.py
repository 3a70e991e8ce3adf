"""What every scheme is."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tiedconv.errors import SchemeError
from tiedconv.expr import Add, Expr, MatMul, Ref, Shape
from tiedconv.gauge import Workbench
from tiedconv.grouping import partition
from tiedconv.plan import Block, Member, Slot
from tiedconv.schemes._align import fold_norms


@dataclass(frozen=True)
class Layout:
    """What a scheme stores for one group.

    Args:
        factors: factor name to shape.
        weights: one expression over the factors for each matrix, in order.
    """

    factors: Mapping[str, Shape]
    weights: tuple[Expr, ...]


@dataclass(frozen=True)
class Draft:
    """A group before its ranks are settled: who takes part, under which scheme."""

    name: str
    scheme: Scheme
    members: tuple[Member, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that take part."""
        return [m.shape for m in self.members]


@dataclass(frozen=True)
class Scheme(ABC):
    """A parametrisation. Fields are its options; methods are pure tensor mathematics.

    Args:
        fold: before the fit, move LayerNorm scales into the weights that read them. Off, as it
            made data-free fits of lors and lowrank worse (docs/results.md).
    """

    name: ClassVar[str]
    looks_for: ClassVar[str]
    least_rank: ClassVar[int] = 0  # the smallest that still gives a matrix
    # Options that take the scheme further down in size, mildest first: what to offer when a
    # budget can't be met.
    further: ClassVar[tuple[Mapping[str, Any], ...]] = ()

    fold: bool = False

    @abstractmethod
    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        """The groups this scheme makes of a model's blocks."""

    @abstractmethod
    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        """Factors and expressions for matrices of these shapes; needs no weights."""

    @abstractmethod
    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """The factors that come closest to the matrices: factor name to tensor."""

    def residuals(self, matrices: Sequence[Tensor]) -> list[Tensor | None]:
        """For each matrix, what its rank is spent on; None where it takes no rank."""
        return [None] * len(matrices)

    def align(self, blocks: Sequence[Block], bench: Workbench) -> None:
        """Move the weights, by exact changes of `gauge`, to where this scheme fits better."""
        if self.fold:
            fold_norms(blocks, bench)

    def with_ranks(self, ranks: Sequence[int]) -> Scheme:
        """The same scheme with one rank for each matrix."""
        del ranks
        return self

    def rank_slots(self, count: int) -> list[bool]:
        """Which of the matrices of a group take a rank."""
        return [False] * count

    def to_json(self) -> dict[str, Any]:
        """The options, as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Ranked(Scheme):
    """A scheme with a rank for some of its matrices.

    Args:
        rank: a number, a share of a matrix's parameters (below 1), or one for each matrix.
        k: multipliers of `rank`, one for each matrix that takes a rank (LORS' K list).
    """

    rank: int | float | tuple[int, ...] = 0
    k: tuple[int, ...] = ()

    def with_ranks(self, ranks: Sequence[int]) -> Scheme:
        return dataclasses.replace(self, rank=tuple(ranks), k=())

    def rank_slots(self, count: int) -> list[bool]:
        return [True] * count

    def ranks(self, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """The rank of each matrix, 0 for those that take none."""
        return resolve_ranks(self.rank, self.k, shapes, self.rank_slots(len(shapes)))


def resolve_ranks(
    rank: int | float | tuple[int, ...],
    k: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    takes: Sequence[bool],
) -> list[int]:
    """One rank for each matrix, from any of the ways in which ranks are given.

    Args:
        rank: a number; a share of a matrix's parameters (below 1); or one for each matrix.
        k: the paper's K list, one multiplier of `rank` for each matrix that takes a rank, or
            empty.
        shapes: of the matrices.
        takes: which of them take a rank; the others get 0.
    """
    count = sum(takes)
    if isinstance(rank, float) and not math.isfinite(rank):
        raise SchemeError(f"rank={rank} is no number", remedy="Use 0 or more")
    if isinstance(rank, tuple) and len(rank) != len(shapes):
        raise SchemeError(
            f"rank lists {len(rank)} numbers, but a group has {len(shapes)} matrices",
            remedy="Give one rank for each matrix, or one number for all",
        )
    if k and len(k) != count:
        raise SchemeError(
            f"k lists {len(k)} multipliers, but a group has {count} layers",
            remedy="Give one multiplier for each layer, or limit the rule with include",
        )
    multipliers = iter(k or [1] * count)
    ranks: list[int] = []
    for i, ((out, inputs), taking) in enumerate(zip(shapes, takes, strict=True)):
        if not taking:
            ranks.append(0)
            continue
        if isinstance(rank, tuple):
            value = float(rank[i])
        else:
            value = rank * next(multipliers)
            if isinstance(rank, float):
                value = math.floor(value * out * inputs / (out + inputs))
        if value < 0:
            raise SchemeError(f"rank={rank} is negative", remedy="Use 0 or more")
        ranks.append(min(int(value), out, inputs))
    return ranks


def with_residual(
    factors: dict[str, Shape], base: Expr | None, j: int, rank: int, shape: tuple[int, int]
) -> Expr:
    """`base + B_j A_j`; adds the factors `B<j>` and `A<j>`."""
    if rank == 0:
        assert base is not None
        return base
    b, a = Ref(f"B{j}", (shape[0], rank)), Ref(f"A{j}", (rank, shape[1]))
    factors |= {b.name: b.of, a.name: a.of}
    product = MatMul(b, a)
    return product if base is None else Add(base, product)


def stacks(
    blocks: Sequence[Block], groups: str, *, fused: bool
) -> Iterator[tuple[str, tuple[Member, ...]]]:
    """The same role of the layers of each stack, divided into groups, by equal shape.

    Args:
        groups: a partition, see `grouping.partition`.
        fused: take a fused tensor (qkv) as one matrix rather than three.
    """
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, Slot]]] = defaultdict(list)
    for block in sorted(blocks, key=lambda b: (b.stack, b.index)):
        for role, slot in (fuse(block.slots) if fused else block.slots).items():
            name = f"{block.stack.replace('.*', '').replace('*', '')}.{role}"
            found[name, slot.matrix_shape].append((block.index, slot))
    used: dict[str, int] = defaultdict(int)
    for (name, _), slots in found.items():
        # Layers of one role but two shapes (a stage's first block) make two groups.
        used[name] += 1
        label = name if used[name] == 1 else f"{name}.shape{used[name]}"
        for part in partition(len(slots), groups):
            where = (
                "" if len(part) == len(slots) else f".{'-'.join(str(slots[i][0]) for i in part)}"
            )
            yield label + where, tuple(Member(slots[i][1]) for i in part)


def fuse(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Slots of one tensor whose rows follow on each other, joined: roles q, k, v become qkv."""
    joined: dict[str, Slot] = {}
    for role, slot in slots.items():
        last = next(reversed(joined), None)
        if last is not None and joined[last].tensor == slot.tensor and (
            joined[last].stop == slot.start
        ):  # fmt: skip
            joined[last + role] = dataclasses.replace(joined.pop(last), stop=slot.stop)
        else:
            joined[role] = slot
    return joined
