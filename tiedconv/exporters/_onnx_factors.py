"""Stored tensors as initializers: each once, in the layout that its uses need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiedconv.core.expr import Expr, Ref

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir.tape import Tape

Make = Callable[[str, Tensor], "ir.Value"]
"""Registers an initializer by name and returns its value."""


@dataclass
class Factors:
    """The stored tensors of a graph, and how they are read.

    All uses in the graph are noted before the first initializer is created: a matrix that is only
    read transposed is stored transposed, one that is only read as a kernel is stored as a kernel.

    Args:
        tensors: stored name to tensor.
        make: registers an initializer.
    """

    tensors: dict[str, Tensor]
    make: Make
    uses: dict[str, set[str]] = field(default_factory=dict)
    values: dict[str, ir.Value] = field(default_factory=dict)

    def note(self, name: str, use: str) -> None:
        """Note a use: `across` (x M^T), `along` (x M), `vector`, `kernel...`, or `whole`."""
        self.uses.setdefault(name, set()).add(use)

    def whole(self, name: str) -> ir.Value:
        """The tensor in its own shape."""
        if name not in self.values:
            self.values[name] = self.make(name, self.tensors[name])
        return self.values[name]

    def is_stored_across(self, name: str) -> bool:
        """Whether the initializer is the transpose, which `across` returns."""
        return self.uses[name] == {"across"}

    def across(self, name: str) -> ir.Value:
        """The transpose of a matrix that has no other use."""
        return self._in_shape(name, lambda t: t.t())

    def vector(self, name: str) -> ir.Value | None:
        """A scale as `(n,)`; None if it has another use."""
        if self.uses[name] != {"vector"}:
            return None
        return self._in_shape(name, lambda t: t.reshape(-1))

    def kernel(self, name: str, shape: tuple[int, ...]) -> ir.Value | None:
        """A matrix as a kernel `(out, in, kh, kw)`; None if it has another use."""
        if self.uses[name] != {kernel_use(shape)}:
            return None
        return self._in_shape(name, lambda t: t.reshape(shape))

    def _in_shape(self, name: str, change: Callable[[Tensor], Tensor]) -> ir.Value:
        if name not in self.values:
            self.values[name] = self.make(name, change(self.tensors[name]))
        return self.values[name]


def kernel_use(shape: tuple[int, ...]) -> str:
    """The name for `Factors.note` of the use as a kernel of this shape."""
    return f"kernel{shape[2:]}"


def emit(expr: Expr, factors: Factors, tape: Tape) -> ir.Value:
    """Add the nodes that compute an expression; returns its value."""
    from tiedconv.core import expr as e
    from tiedconv.core.pad import Pad

    if isinstance(expr, Ref):
        return factors.whole(expr.name)
    inputs = [emit(child, factors, tape) for child in expr.children]
    match expr:
        case e.Permute(dims=dims):
            return tape.op("Transpose", inputs, {"perm": list(dims)})
        case e.Reshape(to=to):
            return tape.op("Reshape", [*inputs, int_constant(tape, to)])
        case e.Slice(dim=dim, start=start, stop=stop):
            ends = [int_constant(tape, [n]) for n in (start, stop, dim)]
            return tape.op("Slice", [*inputs, *ends])
        case Pad(dim=dim):
            return pad_along(tape, inputs[0], dim, expr.shape[dim] - expr.children[0].shape[dim])
        case e.Cat(dim=dim):
            return tape.op("Concat", inputs, {"axis": dim})
        case e.Add():
            return tape.op("Add", inputs)
        case e.Mul():
            return tape.op("Mul", inputs)
        case e.MatMul():
            return tape.op("MatMul", inputs)
    raise AssertionError(expr)


def pad_along(tape: Tape, x: ir.Value, axis: int, count: int) -> ir.Value:
    """A value, and zeros after it along one axis."""
    ends = [int_constant(tape, [0, count]), None, int_constant(tape, [axis])]
    return tape.op("Pad", [x, *ends])


def int_constant(tape: Tape, values: object) -> ir.Value:
    """A constant of integers."""
    import onnx_ir as ir

    tensor = ir.Tensor(np.array(values, dtype=np.int64))
    return tape.op("Constant", [], {"value": tensor})


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor as a contiguous array; bfloat16 is that of ml_dtypes, as numpy has none."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """A new initializer of a graph."""
    import onnx_ir as ir

    stored = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(stored.dtype), shape=stored.shape, const_value=stored
    )
    graph.register_initializer(value)
    return value
