"""The operations of `runtime.factored` as nodes of an ONNX graph, for linear layers and kernels.

Only standard operators are used, and none that a runtime could fold with a constant: a matrix that
is also read transposed goes to `MatMul` and to `Gemm` with `transB`, such a kernel to `Conv` and to
`ConvTranspose`. ONNX Runtime would hold both `W` and a folded `Transpose(W)` in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiedconv.core.expr import Expr, Ref, Reshape, Shape
from tiedconv.exporters._onnx_factors import Factors, emit, int_constant, kernel_use, pad_along
from tiedconv.runtime.factored import NotFactorableError
from tiedconv.runtime.generator import Generated

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.tape import Tape


class NoteLinear:
    """Notes the uses of factors that `OnnxLinear` will make. Features are a placeholder, None."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def product(self, x: None, matrix: Expr, transpose: bool) -> None:
        """`x M^T`, or `x M` if `transpose`."""
        for name in matrix.refs:
            plain = isinstance(matrix, Ref)
            self.factors.note(name, ("along" if transpose else "across") if plain else "whole")

    def scale(self, x: None, vector: Expr) -> None:
        """Each feature times its value."""
        for name in vector.refs:
            self.factors.note(name, "vector" if isinstance(vector, Ref) else "whole")

    def add(self, a: None, b: None) -> None:
        """Nothing to note."""

    def concat(self, parts: Sequence[None]) -> None:
        """Nothing to note."""

    def split(self, x: None, sizes: Sequence[int]) -> list[None]:
        """The features, split into groups."""
        return [None] * len(sizes)

    def first(self, x: None, count: int) -> None:
        """Nothing to note."""

    def pad(self, x: None, count: int) -> None:
        """Nothing to note."""

    def generated(self, x: None, parts: Generated) -> None:
        """The products of a generated weight."""
        for name in {**parts.left.refs, **parts.right.refs}:
            self.factors.note(name, "whole")


class OnnxLinear:
    """Products with features in the last dimension."""

    axis = -1

    def __init__(self, factors: Factors, tape: Tape, rank: int) -> None:
        self.factors, self.tape, self.rank = factors, tape, rank

    def product(self, x: ir.Value, matrix: Expr, transpose: bool) -> ir.Value:
        """`x M^T`, or `x M` if `transpose`."""
        if not isinstance(matrix, Ref):
            value = emit(matrix, self.factors, self.tape)
            return self._along(x, value) if transpose else self._across(x, value, matrix.shape)
        if transpose:
            return self._along(x, self.factors.whole(matrix.name))
        if self.factors.is_stored_across(matrix.name):
            return self._along(x, self.factors.across(matrix.name))
        return self._across(x, self.factors.whole(matrix.name), matrix.shape)

    def _along(self, x: ir.Value, matrix: ir.Value) -> ir.Value:
        return self.tape.op("MatMul", [x, matrix])

    def _across(self, x: ir.Value, matrix: ir.Value, shape: Shape) -> ir.Value:
        if self.rank == 2:
            return self.tape.op("Gemm", [x, matrix], {"transB": 1})
        rows = self._reshaped(x, [-1, shape[1]])
        product = self.tape.op("Gemm", [rows, matrix], {"transB": 1})
        return self._with_leading(product, x, shape[0])

    def scale(self, x: ir.Value, vector: Expr) -> ir.Value:
        """Each feature times its value."""
        return self.tape.op("Mul", [x, self.vector(vector)])

    def vector(self, vector: Expr) -> ir.Value:
        """A scale as `(n,)`."""
        if isinstance(vector, Ref):
            stored = self.factors.vector(vector.name)
            if stored is not None:
                return stored
        whole = emit(vector, self.factors, self.tape)
        return self.tape.op("Reshape", [whole, int_constant(self.tape, [-1])])

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """The sum."""
        return self.tape.op("Add", [a, b])

    def concat(self, parts: Sequence[ir.Value]) -> ir.Value:
        """The features of all parts, concatenated."""
        return self.tape.op("Concat", list(parts), {"axis": self.axis})

    def split(self, x: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """The features, split into groups."""
        split = int_constant(self.tape, list(sizes))
        return list(
            self.tape.op_multi_out("Split", [x, split], {"axis": self.axis}, num_outputs=len(sizes))
        )

    def first(self, x: ir.Value, count: int) -> ir.Value:
        """The first features."""
        ends = [int_constant(self.tape, [n]) for n in (0, count, self.axis)]
        return self.tape.op("Slice", [x, *ends])

    def pad(self, x: ir.Value, count: int) -> ir.Value:
        """The features, and zeros after them."""
        return pad_along(self.tape, x, self.axis, count)

    def generated(self, x: ir.Value, parts: Generated) -> ir.Value:
        """The products of a generated weight, A first: no stored factor need be transposed."""
        terms, r, s = parts.inner
        groups, inputs = parts.left.shape[0], parts.right.shape[-1]
        left, right = (emit(part, self.factors, self.tape) for part in (parts.left, parts.right))
        rows = self._reshaped(x, [1, -1, terms, r, s])
        inner = self.tape.op("MatMul", [rows, right])
        inner = self._reshaped(inner, [groups, -1, terms * r, inputs])
        product = self.tape.op("MatMul", [left, inner])
        product = self.tape.op("Transpose", [product], {"perm": [1, 0, 2, 3]})
        product = self._reshaped(product, [-1, parts.outputs])
        return product if self.rank == 2 else self._with_leading(product, x, parts.outputs)

    def _reshaped(self, x: ir.Value, shape: list[int]) -> ir.Value:
        return self.tape.op("Reshape", [x, int_constant(self.tape, shape)])

    def _with_leading(self, rows: ir.Value, like: ir.Value, features: int) -> ir.Value:
        """Rows of features, reshaped to the leading dimensions of another value."""
        lead = self.tape.op("Shape", [like], {"end": -1})
        whole = self.tape.op("Concat", [lead, int_constant(self.tape, [features])], {"axis": 0})
        return self.tape.op("Reshape", [rows, whole])


@dataclass(frozen=True)
class Kernel:
    """How a convolution reads its input: kernel size `(kh, kw)` and attributes of the node.

    Of a sequence or a video the kernel has one or three sides.
    """

    size: Shape
    attributes: dict[str, object]

    @property
    def point(self) -> Shape:
        """The size of a kernel that reads one place."""
        return (1,) * len(self.size)

    @property
    def is_point(self) -> bool:
        """Whether it is 1 x 1 with stride 1 and no padding: a product at each pixel."""
        plain = all(s == 1 for s in self.attributes.get("strides", ()))  # type: ignore[attr-defined]
        pads = all(p == 0 for p in self.attributes.get("pads", (0,)))  # type: ignore[attr-defined]
        named = self.attributes.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        return self.size == self.point and plain and pads and named


@dataclass(frozen=True)
class Pixels:
    """Features of an image; `fresh` until the first product, which has the kernel's size."""

    value: ir.Value | None
    fresh: bool


class NoteKernel:
    """Notes the uses of factors that `OnnxKernel` will make."""

    def __init__(self, factors: Factors, kernel: Kernel) -> None:
        self.factors, self.kernel = factors, kernel

    def product(self, x: Pixels, matrix: Expr, transpose: bool) -> Pixels:
        """`x M^T`, or `x M` if `transpose`."""
        is_point = not x.fresh or self.kernel.is_point
        if not isinstance(matrix, Ref) or (transpose and not is_point):
            raise NotFactorableError
        size = self.kernel.size if x.fresh else self.kernel.point
        self.factors.note(matrix.name, kernel_use((0, 0, *size)))
        return Pixels(None, fresh=False)

    def scale(self, x: Pixels, vector: Expr) -> Pixels:
        """Each feature times its value."""
        self._check(x)
        NoteLinear(self.factors).scale(None, vector)
        return x

    def add(self, a: Pixels, b: Pixels) -> Pixels:
        """The sum."""
        del b
        return a

    def concat(self, parts: Sequence[Pixels]) -> Pixels:
        """The features of all parts, concatenated."""
        return parts[0]

    def split(self, x: Pixels, sizes: Sequence[int]) -> list[Pixels]:
        """The features, split into groups."""
        self._check(x)
        return [x] * len(sizes)

    def first(self, x: Pixels, count: int) -> Pixels:
        """The first features."""
        del count
        self._check(x)
        return x

    def pad(self, x: Pixels, count: int) -> Pixels:
        """The features, and zeros after them."""
        del count
        return x

    def generated(self, x: Pixels, parts: Generated) -> Pixels:
        """Not supported: generated kernels are materialised."""
        raise NotFactorableError

    def _check(self, x: Pixels) -> None:
        if x.fresh and not self.kernel.is_point:
            raise NotFactorableError  # the features are patches, which are not in memory


class OnnxKernel:
    """Products with features in the channels of an image, of what `NoteKernel` accepts."""

    def __init__(self, factors: Factors, tape: Tape, kernel: Kernel) -> None:
        self.kernel, self.tape, self.factors = kernel, tape, factors
        self.linear = OnnxLinear(factors, tape, 2 + len(kernel.size))
        self.linear.axis = 1

    def product(self, x: Pixels, matrix: Expr, transpose: bool) -> Pixels:
        """`x M^T`, or `x M` if `transpose`."""
        assert isinstance(matrix, Ref)
        size = self.kernel.size if x.fresh else self.kernel.point
        shape = (matrix.shape[0], matrix.shape[1] // math.prod(size), *size)
        stored = self.factors.kernel(matrix.name, shape)
        if stored is None:
            stored = emit(Reshape(matrix, shape), self.factors, self.tape)
        if transpose:
            return self._node("ConvTranspose", [x.value, stored], {"kernel_shape": list(size)})
        own = self.kernel.attributes if x.fresh else {}
        return self._node("Conv", [x.value, stored], {**own, "kernel_shape": list(size)})

    def _node(
        self, op: str, inputs: list[ir.Value | None], attributes: dict[str, object]
    ) -> Pixels:  # fmt: skip
        return Pixels(self.tape.op(op, inputs, attributes), fresh=False)

    def scale(self, x: Pixels, vector: Expr) -> Pixels:
        """Each feature times its value."""
        scale = self.linear.vector(vector)
        size = int_constant(self.tape, [1, -1, *self.kernel.point])
        scale = self.tape.op("Reshape", [scale, size])
        return Pixels(self.tape.op("Mul", [x.value, scale]), x.fresh)

    def add(self, a: Pixels, b: Pixels) -> Pixels:
        """The sum."""
        return Pixels(self.tape.op("Add", [a.value, b.value]), fresh=False)

    def concat(self, parts: Sequence[Pixels]) -> Pixels:
        """The features of all parts, concatenated."""
        return Pixels(self.linear.concat([_value_of(p) for p in parts]), fresh=False)

    def split(self, x: Pixels, sizes: Sequence[int]) -> list[Pixels]:
        """The features, split into groups."""
        return [Pixels(v, x.fresh) for v in self.linear.split(_value_of(x), sizes)]

    def first(self, x: Pixels, count: int) -> Pixels:
        """The first features."""
        return Pixels(self.linear.first(_value_of(x), count), x.fresh)

    def pad(self, x: Pixels, count: int) -> Pixels:
        """The features, and zeros after them."""
        return Pixels(self.linear.pad(_value_of(x), count), fresh=False)

    def generated(self, x: Pixels, parts: Generated) -> Pixels:
        """Not accepted by `NoteKernel`."""
        raise NotFactorableError


def _value_of(x: Pixels) -> ir.Value:
    assert x.value is not None
    return x.value
