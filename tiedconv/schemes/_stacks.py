"""The layers of a stack, role by role, divided into groups."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from tiedconv.core.partition import partition
from tiedconv.core.plan import Block, Member, Slot
from tiedconv.core.units import matrices_of


def stacks(
    blocks: Sequence[Block], groups: str, *, fused: bool
) -> Iterator[tuple[str, tuple[Member, ...]]]:
    """The same role of the layers of each stack, divided into groups, by equal shape.

    Args:
        groups: a partition, see `core.partition.partition`.
        fused: take a fused tensor (qkv) as one matrix rather than three.
    """
    found: dict[tuple[str, tuple[int, ...]], list[tuple[int, Slot]]] = defaultdict(list)
    for block in sorted(blocks, key=lambda b: (b.stack, b.index)):
        for role, slot in (fuse(matrices_of(block)) if fused else matrices_of(block)).items():
            name = f"{block.stack.replace('.*', '').replace('*', '')}.{role}"
            found[name, slot.matrix_shape].append((block.index, slot))
    used: dict[str, int] = defaultdict(int)
    for (name, _), slots in found.items():
        # Layers of one role but two shapes (a stage's first block) make two groups.
        used[name] += 1
        label = name if used[name] == 1 else f"{name}.shape{used[name]}"
        for part in partition(len(slots), groups):
            where = "" if groups == "all" else f".{'-'.join(str(slots[i][0]) for i in part)}"
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
