"""Hidden units of a block: which of its matrices write and read them, by the roles of these.

A unit has a row of each matrix that writes it and the columns of each that reads it: of a gated
feed-forward a row of the gate and of `up` and a column of `down`; of an attention, whose units are
heads, rows of q, k and v and columns of o. Where several heads of queries share one of keys and
values, they are one unit: their rows of q lie together, and there are as many units as heads of
keys. What is known here is all that permuting, removing and
cutting units needs, so a new kind of block is a line of each table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tiedconv.core.plan import Block, Slot

WRITES: Mapping[str, str] = {
    "gate": "hidden", "up": "hidden", "depthwise": "hidden", "expand": "hidden",
    "reduce": "squeezed",
    "conv1": "conv1", "bn1": "conv1",
    "conv2": "conv2", "bn2": "conv2",
    "q": "heads", "k": "heads", "v": "heads",
}  # fmt: skip
"""The units that have rows of a matrix, or entries of a vector whose role begins with this."""

READS: Mapping[str, str] = {
    "down": "hidden", "reduce": "hidden", "expand": "squeezed",
    "conv2": "conv1", "conv3": "conv2",
    "o": "heads",
}  # fmt: skip
"""The units that have columns of a matrix."""

PERMUTES: Mapping[str, str] = {
    "hidden": "permute hidden units",
    "squeezed": "permute squeezed units",
    "conv1": "permute units after conv1",
    "conv2": "permute units after conv2",
    "heads": "permute heads",
}
"""The symmetry that puts units in another order."""


@dataclass(frozen=True)
class Units:
    """The units of one name.

    Args:
        name: see `WRITES`.
        writers, readers: places of matrices in a list of roles.
    """

    name: str
    writers: tuple[int, ...]
    readers: tuple[int, ...]


def units_among(roles: Sequence[str]) -> list[Units]:
    """The units that some matrices, given by their roles, write and read, in the order of these.

    Those that are written but not read, or read but not written, are left out.
    """
    names = dict.fromkeys(WRITES[role] for role in roles if role in WRITES)
    found = [
        Units(
            name,
            tuple(i for i, role in enumerate(roles) if WRITES.get(role) == name),
            tuple(i for i, role in enumerate(roles) if READS.get(role) == name),
        )
        for name in names
    ]
    return [units for units in found if units.readers]


def units_of(block: Block) -> list[Units]:
    """The units of a block whose number is known, with places among the roles of its slots."""
    return [u for u in units_among([*block.slots]) if count_of(block, u) is not None]


def count_of(block: Block, units: Units) -> int | None:
    """How many units there are; None where sizes do not agree, as with groups of a convolution."""
    slots = [*block.slots.values()]
    written = {slots[i].rows for i in units.writers}
    read = {slots[i].columns // area_of(slots[i]) for i in units.readers}
    if units.name == "heads":
        return _heads(written, read, block.heads)
    return None if len(written | read) > 1 else written.pop()


def _heads(written: set[int], read: set[int], heads: int | None) -> int | None:
    """Heads of keys and values, where each has as many of the queries."""
    least, most = min(written), max(written)
    if not heads or read != {most} or written - {least, most} or most % least:
        return None
    groups, rest = divmod(heads * least, most)
    return None if rest else groups


def rows_of_units(rows: Iterable[int]) -> int:
    """What the writers of some units have rows of: those with more have several for each of these.

    Args:
        rows: of each writer.
    """
    return min(rows)


def area_of(slot: Slot) -> int:
    """Entries of a kernel, 1 of a linear layer."""
    return math.prod(slot.kernel)


def is_depthwise(slot: Slot) -> bool:
    """Whether it is a kernel for each channel, as a depthwise convolution has."""
    return len(slot.shape) > 2 and slot.shape[1] == 1 and slot.rows > 1


def matrices_of(block: Block) -> dict[str, Slot]:
    """The slots that mix channels: all but depthwise kernels, which no scheme approximates."""
    return {role: slot for role, slot in block.slots.items() if not is_depthwise(slot)}
