"""The expression algebra: how a weight is computed from stored tensors.

An expression is a small tree of frozen nodes. Its leaves are `Ref`s, names of stored tensors
with their shapes; inner nodes permute, reshape, slice, join, pad, add, multiply, dequantize. No
other exists: a file that holds expressions can describe weights, but it can never name code to run.

    >>> W = Ref("W", (64, 256))
    >>> conv3 = Reshape(Permute(W, (1, 0)), (256, 64, 1, 1))   # W^T as a 1x1 convolution
    >>> conv3.shape, conv3.is_view
    ((256, 64, 1, 1), True)

Shapes are checked when a node is built, so an expression that exists is well-typed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiedconv.core.packed_codes import WIDTHS, integers_of, packed_length, unpacked
from tiedconv.core.row_col_scale import scaled
from tiedconv.errors import PlanError

Shape = tuple[int, ...]
Lookup = Callable[[str], Tensor]

# Far above what any scheme builds, far below what could hurt a reader of an untrusted file.
MAX_ELEMENTS = 2**40
MAX_NAME = 500


@dataclass(frozen=True)
class Expr:
    """A node of the algebra. `shape` is that of the tensor it evaluates to."""

    tag: ClassVar[str] = ""
    shape: Shape = field(init=False, compare=False, repr=False, default=())

    def __post_init__(self) -> None:
        shape = self._infer_shape()
        if any(n < 1 for n in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise PlanError(
                f"An expression has the impossible shape {shape}",
                hint="The file is damaged or forged: convert the model again",
                code="impossible-shape",
            )
        object.__setattr__(self, "shape", shape)

    def _infer_shape(self) -> Shape:
        raise NotImplementedError

    def __deepcopy__(self, memo: object) -> Expr:
        return self  # immutable

    @property
    def children(self) -> tuple[Expr, ...]:
        """The nodes that this one reads."""
        return ()

    def evaluate(self, lookup: Lookup) -> Tensor:
        """The tensor this expression stands for.

        Args:
            lookup: gives the stored tensor of a name.
        """
        raise NotImplementedError

    def walk(self) -> Iterator[Expr]:
        """This node and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def refs(self) -> dict[str, Shape]:
        """The stored tensors that are read: name to shape."""
        return {node.name: node.shape for node in self.walk() if isinstance(node, Ref)}

    @property
    def is_view(self) -> bool:
        """True if evaluating allocates nothing: the result shares the stored tensor's memory."""
        if not all(isinstance(node, Ref | Permute | Reshape | Slice) for node in self.walk()):
            return False
        shape = next(iter(self.refs.values()))
        # Whether a reshape can stay a view depends on strides; torch itself knows best.
        stored = torch.empty(shape, device="meta")
        result = self.evaluate(lambda _: stored)
        return result is stored or result._base is stored

    def map_children(self, to: Callable[[Expr], Expr]) -> Expr:
        """The same node over other children, of the same shapes."""
        return self._with(tuple(map(to, self.children))) if self.children else self

    def substitute(self, to: Callable[[Ref], Expr]) -> Expr:
        """The same expression with other expressions, of the same shapes, in place of its refs."""
        return self.map_children(lambda child: child.substitute(to))

    def rename(self, to: Callable[[str], str]) -> Expr:
        """The same expression over stored tensors of other names."""
        return self.substitute(lambda ref: Ref(to(ref.name), ref.shape))

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        raise NotImplementedError

    def to_json(self) -> list[Any]:
        """Nested lists: `[tag, child..., argument...]`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Ref(Expr):
    """A stored tensor, by name. `of` is its shape."""

    tag: ClassVar[str] = "ref"
    name: str = ""
    of: Shape = ()

    def _infer_shape(self) -> Shape:
        return self.of

    def evaluate(self, lookup: Lookup) -> Tensor:
        return lookup(self.name)

    def substitute(self, to: Callable[[Ref], Expr]) -> Expr:
        return to(self)

    def to_json(self) -> list[Any]:
        return [self.tag, self.name, list(self.of)]


@dataclass(frozen=True)
class Permute(Expr):
    """Dimensions in another order, as `torch.permute`."""

    tag: ClassVar[str] = "permute"
    x: Expr = field(default_factory=Expr)
    dims: tuple[int, ...] = ()

    def _infer_shape(self) -> Shape:
        if sorted(self.dims) != list(range(len(self.x.shape))):
            raise malformed(f"permute{self.dims} of shape {self.x.shape}")
        return tuple(self.x.shape[d] for d in self.dims)

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return Permute(children[0], self.dims)

    def evaluate(self, lookup: Lookup) -> Tensor:
        return self.x.evaluate(lookup).permute(self.dims)

    def to_json(self) -> list[Any]:
        return [self.tag, self.x.to_json(), list(self.dims)]


@dataclass(frozen=True)
class Reshape(Expr):
    """The same elements, row by row, in another shape, as `torch.reshape`."""

    tag: ClassVar[str] = "reshape"
    x: Expr = field(default_factory=Expr)
    to: Shape = ()

    def _infer_shape(self) -> Shape:
        if math.prod(self.to) != math.prod(self.x.shape):
            raise malformed(f"reshape of {self.x.shape} to {self.to}")
        return self.to

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return Reshape(children[0], self.to)

    def evaluate(self, lookup: Lookup) -> Tensor:
        return self.x.evaluate(lookup).reshape(self.to)

    def to_json(self) -> list[Any]:
        return [self.tag, self.x.to_json(), list(self.to)]


@dataclass(frozen=True)
class Slice(Expr):
    """Elements `start` to `stop` (not included) of one dimension, as `torch.narrow`."""

    tag: ClassVar[str] = "slice"
    x: Expr = field(default_factory=Expr)
    dim: int = 0
    start: int = 0
    stop: int = 0

    def _infer_shape(self) -> Shape:
        shape = self.x.shape
        if not (0 <= self.dim < len(shape) and 0 <= self.start < self.stop <= shape[self.dim]):
            raise malformed(f"slice {self.start}:{self.stop} of dimension {self.dim} of {shape}")
        return (*shape[: self.dim], self.stop - self.start, *shape[self.dim + 1 :])

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return Slice(children[0], self.dim, self.start, self.stop)

    def evaluate(self, lookup: Lookup) -> Tensor:
        return self.x.evaluate(lookup).narrow(self.dim, self.start, self.stop - self.start)

    def to_json(self) -> list[Any]:
        return [self.tag, self.x.to_json(), self.dim, self.start, self.stop]


@dataclass(frozen=True)
class Cat(Expr):
    """Tensors joined along one dimension, as `torch.cat`."""

    tag: ClassVar[str] = "cat"
    xs: tuple[Expr, ...] = ()
    dim: int = 0

    def _infer_shape(self) -> Shape:
        shapes = [x.shape for x in self.xs]
        d = self.dim
        if not shapes or not 0 <= d < len(shapes[0]):
            raise malformed(f"cat of {shapes} along dimension {d}")
        if len({(*s[:d], 0, *s[d + 1 :]) for s in shapes}) != 1:
            raise malformed(f"cat of {shapes} along dimension {d}")
        return (*shapes[0][:d], sum(s[d] for s in shapes), *shapes[0][d + 1 :])

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.xs

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return Cat(children, self.dim)

    def evaluate(self, lookup: Lookup) -> Tensor:
        return torch.cat([x.evaluate(lookup) for x in self.xs], self.dim)

    def to_json(self) -> list[Any]:
        return [self.tag, [x.to_json() for x in self.xs], self.dim]


@dataclass(frozen=True)
class _Binary(Expr):
    a: Expr = field(default_factory=Expr)
    b: Expr = field(default_factory=Expr)

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.a, self.b)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        return type(self)(*children)

    def to_json(self) -> list[Any]:
        return [self.tag, self.a.to_json(), self.b.to_json()]

    def _broadcast(self, last: int = 0) -> Shape:
        """The shape that both have by broadcasting, of all dimensions but the `last` ones."""
        a, b = (x.shape[: len(x.shape) - last] for x in self.children)
        count = max(len(a), len(b))
        pairs = list(zip((1,) * (count - len(a)) + a, (1,) * (count - len(b)) + b, strict=True))
        if any(m != n and 1 not in (m, n) for m, n in pairs):
            raise malformed(f"{self.tag} of {self.a.shape} and {self.b.shape}")
        return tuple(max(pair) for pair in pairs)


@dataclass(frozen=True)
class Add(_Binary):
    """`a + b`, with broadcasting."""

    tag: ClassVar[str] = "add"

    def _infer_shape(self) -> Shape:
        return self._broadcast()

    def evaluate(self, lookup: Lookup) -> Tensor:
        flat = len(self.a.shape) == len(self.shape) == 2
        if isinstance(self.b, MatMul) and flat and self.b.shape == self.shape:
            # base + B A in one pass over memory: the product is never a tensor of its own.
            base, product = self.a.evaluate(lookup), self.b
            return torch.addmm(base, product.a.evaluate(lookup), product.b.evaluate(lookup))
        return self.a.evaluate(lookup) + self.b.evaluate(lookup)


@dataclass(frozen=True)
class Mul(_Binary):
    """`a * b`, element by element, with broadcasting."""

    tag: ClassVar[str] = "mul"

    def _infer_shape(self) -> Shape:
        return self._broadcast()

    def evaluate(self, lookup: Lookup) -> Tensor:
        inner, b = self.a, self.b.evaluate(lookup)
        if isinstance(inner, Mul) and inner._scales((-1, 1)) and self._scales((1, -1)):
            return scaled(inner.a.evaluate(lookup), inner.b.evaluate(lookup), b)
        a = inner.evaluate(lookup)
        if (
            isinstance(self.a, _Binary)
            and self.a.shape == self.shape
            and not torch.is_grad_enabled()
        ):
            return a.mul_(b)  # a is a temporary: one pass over memory, no new allocation
        return a * b

    def _scales(self, of: Shape) -> bool:
        """Whether `b` is a column (-1, 1) or a row (1, -1) of factors for the matrix `a`."""
        sizes = tuple(n if one < 0 else 1 for n, one in zip(self.shape, of, strict=False))
        return len(self.shape) == 2 and self.a.shape == self.shape and self.b.shape == sizes


@dataclass(frozen=True)
class MatMul(_Binary):
    """`a @ b` of matrices, in the last two dimensions; those before are broadcast."""

    tag: ClassVar[str] = "matmul"

    def _infer_shape(self) -> Shape:
        a, b = self.a.shape, self.b.shape
        if len(a) < 2 or len(b) < 2 or a[-1] != b[-2]:
            raise malformed(f"matmul of {a} and {b}")
        return (*self._broadcast(last=2), a[-2], b[-1])

    def evaluate(self, lookup: Lookup) -> Tensor:
        return self.a.evaluate(lookup) @ self.b.evaluate(lookup)


@dataclass(frozen=True)
class Dequantize(Expr):
    """A matrix of integers times their scales: `codes * scales`, in the type of the scales.

    Args:
        codes: uint8, packed (see `packed_codes`): rows after one another, `bits` each.
        scales: `(rows, groups)`; the columns are cut into groups of equal width, the last one
            may be narrower.
        bits: of each code.
        columns: of the matrix.
    """

    tag: ClassVar[str] = "dequantize"
    codes: Expr = field(default_factory=Expr)
    scales: Expr = field(default_factory=Expr)
    bits: int = 8
    columns: int = 1

    def _infer_shape(self) -> Shape:
        scales = self.scales.shape
        if len(scales) != 2 or self.columns < 1:
            raise malformed(f"dequantize with scales of shape {scales}, {self.columns} columns")
        shape = (scales[0], self.columns)
        # As many groups as columns of that width fill, no more.
        fits = scales[1] == -(-self.columns // -(-self.columns // scales[1]))
        fits = fits and isinstance(self.codes, Ref) and self.bits in WIDTHS
        if not fits or self.codes.shape != (packed_length(math.prod(shape), self.bits),):
            raise malformed(
                f"{self.bits}-bit codes of shape {self.codes.shape} for scales of shape {scales} "
                f"and {self.columns} columns"
            )
        return shape

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.codes, self.scales)

    def _with(self, children: tuple[Expr, ...]) -> Expr:
        codes, scales = children
        return Dequantize(codes, scales, self.bits, self.columns)

    def evaluate(self, lookup: Lookup) -> Tensor:
        scales = self.scales.evaluate(lookup)
        codes = self.codes.evaluate(lookup)
        if codes.is_floating_point():  # in training, see `runtime.soft_codes`
            codes = codes + (codes.round().clamp(*integers_of(self.bits)) - codes).detach()
        else:
            codes = unpacked(codes, self.shape, self.bits).to(scales.dtype)
        groups = scales.shape[1]
        if groups > 1:
            scales = scales.repeat_interleave(-(-self.columns // groups), 1)[:, : self.columns]
        return codes * scales

    def to_json(self) -> list[Any]:
        return [self.tag, self.codes.to_json(), self.scales.to_json(), self.bits, self.columns]


def transpose(x: Expr) -> Expr:
    """The transpose of a matrix expression; two transposes cancel."""
    if isinstance(x, Permute) and x.dims == (1, 0):
        return x.x
    return Permute(x, (1, 0))


def reshape(x: Expr, shape: Sequence[int]) -> Expr:
    """`x` in another shape; nothing is added when it has that shape already."""
    return x if x.shape == tuple(shape) else Reshape(x, tuple(shape))


def is_name(text: object) -> bool:
    """Whether this can be the name of a tensor or group: a printable text of bounded length."""
    return isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable()


def malformed(what: str, code: str = "malformed-expression") -> PlanError:
    """The error for an expression that can't be computed."""
    return PlanError(
        f"A weight's expression is malformed: {what[:300]}",
        "The weight can't be computed",
        "If this came from a file, it is damaged or forged: convert the model again",
        code=code,
    )
