"""Any model with numbered stacks: `stages.2.blocks.5.conv.weight` and the like.

Of the numbers in a tensor's name, the one that counts layers is the one along which most tensors
of the same shape stand. Within a layer, two neighbouring matrices of shapes (m, d) and (d, m)
with m > d are taken for a feed-forward; what lies between them is unknown, so the blocks
are not permutable.

This is not the question of `core.block_names`, which asks in what module a tensor lies. Here it is
which tensors of different layers match one another, and that depends on their shapes: the layers
of two stacks may lie in one block, and those of one stack need not lie in blocks at all.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block, Slot
from tiedconv.families._patterns import Family, Hints, Shapes

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def _find(shapes: Shapes, hints: Hints) -> list[Block]:
    names_by_stack: dict[tuple[str, Shape], list[str]] = defaultdict(list)
    weights = {n: s for n, s in shapes.items() if _is_matrix(n, s)}
    for name, shape in weights.items():
        for match in _NUMBER.finditer(name):
            names_by_stack[_starred(name, match), shape].append(name)

    layers: dict[tuple[str, int], dict[str, Slot]] = defaultdict(dict)
    for name, shape in weights.items():
        places = list(_NUMBER.finditer(name))
        if not places:
            continue
        best = max(places, key=lambda m: len(names_by_stack[_starred(name, m), shape]))
        if len(names_by_stack[_starred(name, best), shape]) > 1:
            layer = (f"{name[: best.start()]}*", int(best.group()))
            layers[layer][name[best.end() + 1 :]] = Slot.whole(name, shape)
    blocks: list[Block] = []
    for (stack, index), slots in layers.items():
        blocks += _split(stack, index, slots)
    return blocks


def _split(stack: str, index: int, slots: dict[str, Slot]) -> list[Block]:
    """The feed-forwards of a layer, and what is left, as blocks."""
    blocks: list[Block] = []
    rest = dict(slots)
    roles = list(slots)
    for up, down in itertools.pairwise(roles):
        m, d = slots[up].matrix_shape
        if up in rest and down in rest and m > d and slots[down].matrix_shape == (d, m):
            pair = {"up": rest.pop(up), "down": rest.pop(down)}
            part = f".{up.removesuffix('.weight')}"
            name = stack.replace("*", str(index))
            blocks.append(Block("ffn", name + part, stack + part, index, pair, permutable=False))
    if rest:
        name = stack.replace("*", str(index))
        blocks.append(Block("linear", name, stack, index, rest, permutable=False))
    return blocks


def _starred(name: str, match: re.Match[str]) -> str:
    return f"{name[: match.start()]}*{name[match.end() :]}"


def _is_matrix(name: str, shape: Shape) -> bool:
    """Weights of linear layers and convolutions; no embeddings, no depthwise kernels."""
    small = min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else 0
    return (
        name.endswith("weight") and len(shape) in (2, 4, 5) and small > 1
        and not (len(shape) > 2 and shape[1] == 1) and "embed" not in name
    )  # fmt: skip


FAMILY = Family("generic", "stack.0.name.weight, stack.1.name.weight, ...", _find, last=True)
