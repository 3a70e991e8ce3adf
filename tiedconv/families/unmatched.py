"""Matrices that match no other: a classifier, a stem, a projection between stages.

Each is a stack of its own. Schemes that share between layers leave it as it is; low rank, and
`auto` by it, may store it in fewer parameters. An error in one of these costs far more than in
other matrices, so without images, which show it, a budget takes them only if they are named or it
can't be met otherwise (`conversion.pipeline.plan_on`).
"""

from __future__ import annotations

from tiedconv.core.plan import Block, Slot
from tiedconv.families._patterns import Family, Hints, Shapes, is_matrix

_LEAST_SIDE = 8
"""Rows or columns of a matrix that is worth two factors."""


def _find(shapes: Shapes, hints: Hints) -> list[Block]:
    blocks: list[Block] = []
    for name, shape in shapes.items():
        if is_matrix(name, shape, hints, _LEAST_SIDE):
            module, _, role = name.rpartition(".")
            place = module or name
            slots = {role: Slot.whole(name, shape)}
            blocks.append(Block("linear", place, place, 0, slots, permutable=False, unmatched=True))
    return blocks


FAMILY = Family("unmatched", "any matrix of 8 rows and columns or more", _find, last=True)
