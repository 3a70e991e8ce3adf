"""How much of a model can be converted, and what can't."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tiedconv.core.plan import Slot
from tiedconv.families.inspect import ModelInfo

LARGEST = 10
"""Of the tensors in no block, so many are named."""


@dataclass(frozen=True)
class Coverage:
    """Parameters in matrices that can be converted, and all others.

    Args:
        parameters: of the model.
        covered: of them, in blocks.
        left: the largest tensors in no block, and their parameters there.
    """

    parameters: int
    covered: int
    left: tuple[tuple[str, int], ...]

    @property
    def share(self) -> float:
        """The covered fraction."""
        return self.covered / max(1, self.parameters)

    def largest(self, count: int = 3) -> str:
        """Names and sizes of the largest tensors in no block, "" if there are none."""
        return ", ".join(f"{name} ({size:,})" for name, size in self.left[:count])


def coverage(info: ModelInfo, slots: Iterable[Slot] | None = None) -> Coverage:
    """The coverage of a model by some matrices; by all of its blocks but opt-in ones if None."""
    if slots is None:
        slots = (s for _, b in info.blocks if not b.opt_in for s in b.slots.values())
    inside: dict[str, int] = {}
    for slot in slots:
        inside[slot.tensor] = inside.get(slot.tensor, 0) + slot.numel
    sizes = {name: math.prod(shape) for name, shape in info.parameters.items()}
    left = {name: size - inside.get(name, 0) for name, size in sizes.items()}
    ranked = sorted(((n, s) for n, s in left.items() if s), key=lambda item: -item[1])
    return Coverage(
        sum(sizes.values()), sum(sizes.values()) - sum(left.values()), tuple(ranked[:LARGEST])
    )
