"""The parts of a model, and how many bytes each takes before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tiedconv.core.tables import without_numbers
from tiedconv.pages.tensors import TensorFigures

SHOWN = 9
"""Parts with a row and a colour of their own; the others are one row."""


@dataclass(frozen=True)
class Part:
    """Modules that differ in the number of a layer alone.

    Args:
        name: theirs, with `*` for numbers.
        modules: how many.
        parameters: of the original.
        original, stored: bytes before and after.
        bits: widths of its integers; empty without any.
        colour: which of the page's colours, from 1; 0 for grey.
    """

    name: str
    modules: int
    parameters: int
    original: float
    stored: float
    bits: tuple[int, ...] = ()
    colour: int = 0

    @property
    def bits_each(self) -> float:
        """Bits in the file for each parameter of the original."""
        return 8 * self.stored / max(1, self.parameters)


def parts_of(tensors: Sequence[TensorFigures]) -> tuple[Part, ...]:
    """The parts of a model, the largest first, small ones as one."""
    modules: dict[str, list[TensorFigures]] = defaultdict(list)
    for tensor in tensors:
        modules[without_numbers(tensor.module)].append(tensor)
    # By name where sizes are equal: a part has one colour in all files of a model.
    order = sorted(modules, key=lambda name: (-sum(t.original for t in modules[name]), name))
    few = order if len(order) <= SHOWN + 1 else order[:SHOWN]
    shown = [
        _part(name, modules[name], colour if colour <= SHOWN else 0)
        for colour, name in enumerate(few, 1)
    ]
    rest = [tensor for name in order[len(few) :] for tensor in modules[name]]
    return (*shown, *([_part("all other parts", rest, 0)] if rest else []))


def _part(name: str, tensors: Sequence[TensorFigures], colour: int) -> Part:
    return Part(
        name,
        len({t.module for t in tensors}),
        sum(t.parameters for t in tensors),
        sum(t.original for t in tensors),
        sum(t.stored for t in tensors),
        tuple(sorted({bits for t in tensors for bits in t.bits})),
        colour,
    )


def in_common(files: Sequence[Sequence[Part]]) -> bool:
    """Whether files have the same parts before their conversion, so that they can be compared."""

    def before(parts: Sequence[Part]) -> Mapping[str, tuple[int, float]]:
        return {part.name: (part.colour, part.original) for part in parts}

    return all(before(parts) == before(files[0]) for parts in files[1:])
