"""Model families: pure functions from tensor names and shapes to blocks.

Each file of this folder that does not begin with an underscore holds one `FAMILY`; `inspect`
extracts what families need from a model. A family gets `{name: shape}` and a few facts that shapes
don't show (`hints`: number of heads, activation, epsilon of a norm, where known), so it works on a
file's header without building a model, and it imports no model library. A new family is one new
file.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block
from tiedconv.families._patterns import Family, Hints

__all__ = ["Family", "Hints", "all_families", "find_blocks"]


@functools.cache
def all_families() -> tuple[Family, ...]:
    """Every family of the folder; those that match anything come last."""
    files = (m.name for m in pkgutil.iter_modules(__path__))
    names = sorted(n for n in files if not n.startswith("_") and n != "inspect")
    found = [importlib.import_module(f"{__name__}.{name}").FAMILY for name in names]
    return tuple(sorted(found, key=lambda family: family.last))


def find_blocks(
    shapes: Mapping[str, Shape], hints: Hints | None = None
) -> Sequence[tuple[str, Block]]:
    """Every block of a model, with the name of the family that found it.

    A tensor belongs to the first family that claims it. Families that match anything come last, so
    they get what no other family knows.

    Args:
        shapes: tensor name to shape, in the model's order.
        hints: facts about modules, such as `{"blocks.0.attn.num_heads": 3}`.
    """
    left = dict(shapes)
    blocks: list[tuple[str, Block]] = []
    for family in all_families():
        for block in family.find(left, hints or {}):
            blocks.append((family.name, block))
        for _, block in blocks:
            for slot in block.slots.values():
                left.pop(slot.tensor, None)
    return blocks
