"""Any model with numbered layers: `stages.2.blocks.5.conv.weight`, `block4-1`, `denselayer1`.

Of the numbers in a tensor's name, the one that counts layers is the one along which most tensors
of the same shape stand; a number that is a name of its own goes before one that ends a word.
Within a module, two matrices of shapes (m, d) and (d, m), with nothing between them but such pairs,
are taken for a feed-forward, whichever of m and d is the larger; what lies between them is
unknown, so the blocks are not permutable.

This is not the question of `core.block_names`, which asks in what module a tensor lies. Here it is
which tensors of different layers match one another, and that depends on their shapes: the layers
of two stacks may lie in one block, and those of one stack need not lie in blocks at all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block, Slot
from tiedconv.families._patterns import Family, Hints, Shapes, is_matrix

_ALONE = re.compile(r"(?<![^.])\d+(?=\.)")
_IN_A_WORD = re.compile(r"\d+(?=[^.\d]*\.[^.]+\.)")  # not of the module that holds the tensor
Layers = dict[tuple[str, int], dict[str, Slot]]


def _find(shapes: Shapes, hints: Hints) -> list[Block]:
    left = {n: s for n, s in shapes.items() if is_matrix(n, s, hints)}
    layers: Layers = defaultdict(dict)
    for number in (_ALONE, _IN_A_WORD):
        for name in _numbered(left, number, layers):
            del left[name]
    blocks: list[Block] = []
    for (stack, index), slots in layers.items():
        blocks += _split(stack, index, slots)
    return blocks


def _numbered(shapes: Shapes, number: re.Pattern[str], layers: Layers) -> list[str]:
    """Put the tensors that stand in a stack into its layers; their names."""
    names_by_stack: dict[tuple[str, Shape], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        for match in number.finditer(name):
            names_by_stack[_starred(name, match), shape].append(name)
    found: list[str] = []
    for name, shape in shapes.items():
        places = list(number.finditer(name))
        if not places:
            continue
        best = max(places, key=lambda m: len(names_by_stack[_starred(name, m), shape]))
        if len(names_by_stack[_starred(name, best), shape]) > 1:
            found.append(name)
            layer = (f"{name[: best.start()]}*", int(best.group()))
            layers[layer][name[best.end() :].lstrip(".")] = Slot.whole(name, shape)
    return found


def _split(stack: str, index: int, slots: dict[str, Slot]) -> list[Block]:
    """The feed-forwards of a layer, and what is left, as blocks."""
    blocks: list[Block] = []
    rest = dict(slots)
    name = stack.replace("*", str(index))
    for up, down in _pairs(slots):
        pair = {"up": rest.pop(up), "down": rest.pop(down)}
        part = f".{up.removesuffix('.weight')}"
        blocks.append(Block("ffn", name + part, stack + part, index, pair, permutable=False))
    if rest:
        blocks.append(Block("linear", name, stack, index, rest, permutable=False))
    return blocks


def _pairs(slots: dict[str, Slot]) -> Iterator[tuple[str, str]]:
    """Roles of matrices whose shapes are each other's transpose, as parentheses are paired.

    Those that widen first; a squeeze in the midst of a pair does not part it.
    """
    roles = list(slots)
    for widens in (True, False, True):
        i = 0
        while i + 1 < len(roles):
            first, second = slots[roles[i]], slots[roles[i + 1]]
            m, d = first.matrix_shape
            fits = second.matrix_shape == (d, m) and (m > d if widens else m < d)
            if fits and _beside(roles[i], roles[i + 1]):
                yield roles.pop(i), roles.pop(i)
                i = max(0, i - 1)
            else:
                i += 1


def _beside(first: str, second: str) -> bool:
    """Whether two layers lie in one module, such as `fc1` and `fc2`, `a.conv` and `b.conv`."""
    one, two = first.split("."), second.split(".")
    while len(one) > 1 and len(two) > 1 and one[-1] == two[-1]:
        one.pop()
        two.pop()
    return one[:-1] == two[:-1]


def _starred(name: str, match: re.Match[str]) -> str:
    return f"{name[: match.start()]}*{name[match.end() :]}"


FAMILY = Family("generic", "stack.0.name.weight, stack.1.name.weight, ...", _find, last=True)
