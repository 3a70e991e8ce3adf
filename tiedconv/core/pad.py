"""Padding with zeros: a node of the expression algebra, for weights of removed hidden units."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import pad

from tiedconv.core.expr import Expr, Lookup, Permute, Reshape, Shape, malformed


@dataclass(frozen=True)
class Pad(Expr):
    """A tensor, and zeros after it along one dimension, which has `size` entries then."""

    tag: ClassVar[str] = "pad"
    x: Expr = field(default_factory=Expr)
    dim: int = 0
    size: int = 0

    def _infer_shape(self) -> Shape:
        shape, d = self.x.shape, self.dim
        if not (0 <= d < len(shape) and shape[d] <= self.size):
            raise malformed(f"pad of {shape} to {self.size} along dimension {d}")
        return (*shape[:d], self.size, *shape[d + 1 :])

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return Pad(children[0], self.dim, self.size)

    def evaluate(self, lookup: Lookup) -> Tensor:
        later = len(self.shape) - self.dim - 1
        zeros = self.size - self.x.shape[self.dim]
        return pad(self.x.evaluate(lookup), (0, 0) * later + (0, zeros))

    def to_json(self) -> list[Any]:
        return [self.tag, self.x.to_json(), self.dim, self.size]


def padded(x: Expr, dim: int, size: int) -> Expr:
    """`x` with zeros after it; nothing is added when it has that size already."""
    return x if x.shape[dim] == size else Pad(x, dim, size)


def has_pads(exprs: Iterable[Expr]) -> bool:
    """Whether any of these pads."""
    return any(isinstance(node, Pad) for expr in exprs for node in expr.walk())


def share_kept(weight: Expr) -> float:
    """The share of a weight's values that are its own: the others are zeros around it."""
    share = 1.0
    while isinstance(weight, Pad | Permute | Reshape):
        if isinstance(weight, Pad):
            share *= weight.x.shape[weight.dim] / weight.size
        weight = weight.x
    return share
