"""Matrices that match no other: a classifier, a stem, a projection between stages.

Each is a stack of its own. Schemes that share between layers leave it as it is; low rank, and
`auto` by it, may store it in fewer parameters.
"""

from __future__ import annotations

from tiedconv.core.plan import Block, Slot
from tiedconv.families._patterns import Family, Hints, Shapes, is_matrix

LEAST_SIDE = 8
"""Rows or columns of a matrix that is worth two factors."""


def _find(shapes: Shapes, hints: Hints) -> list[Block]:
    blocks: list[Block] = []
    for name, shape in shapes.items():
        if is_matrix(name, shape, hints, LEAST_SIDE):
            module, _, role = name.rpartition(".")
            place = module or name
            slots = {role: Slot.whole(name, shape)}
            blocks.append(Block("linear", place, place, 0, slots, permutable=False))
    return blocks


FAMILY = Family("unmatched", "any matrix of 8 rows and columns or more", _find, last=True)
