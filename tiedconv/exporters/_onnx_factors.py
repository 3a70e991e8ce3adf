"""Stored tensors as initializers: each once, in the shape that most of its uses want."""

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
"""Registers an initializer by name and gives its value."""


@dataclass
class Factors:
    """The stored tensors of a graph, and how they are read.

    Uses are first noted, for all of the graph, and then made: a matrix that is only ever read
    transposed is stored transposed, one that is only a kernel is stored as one.

    Args:
        tensors: stored name to tensor.
        make: registers an initializer.
    """

    tensors: dict[str, Tensor]
    make: Make
    wanted: dict[str, set[str]] = field(default_factory=dict)
    made: dict[str, ir.Value] = field(default_factory=dict)

    def note(self, name: str, use: str) -> None:
        """A use to come: `across` (x M^T), `along` (x M), `vector`, `kernel...`, or `whole`."""
        self.wanted.setdefault(name, set()).add(use)

    def whole(self, name: str) -> ir.Value:
        """The tensor in its own shape."""
        if name not in self.made:
            self.made[name] = self.make(name, self.tensors[name])
        return self.made[name]

    def is_stored_across(self, name: str) -> bool:
        """Whether `across` hands out the transpose itself."""
        return self.wanted[name] == {"across"}

    def across(self, name: str) -> ir.Value:
        """The transpose of a matrix that is read in no other way."""
        return self._in_shape(name, lambda t: t.t())

    def vector(self, name: str) -> ir.Value | None:
        """A scale as `(n,)`, if it is read as nothing else."""
        if self.wanted[name] != {"vector"}:
            return None
        return self._in_shape(name, lambda t: t.reshape(-1))

    def kernel(self, name: str, shape: tuple[int, ...]) -> ir.Value | None:
        """A matrix as a kernel `(out, in, kh, kw)`, if it is read as nothing else."""
        if self.wanted[name] != {kernel_use(shape)}:
            return None
        return self._in_shape(name, lambda t: t.reshape(shape))

    def _in_shape(self, name: str, change: Callable[[Tensor], Tensor]) -> ir.Value:
        if name not in self.made:
            self.made[name] = self.make(name, change(self.tensors[name]))
        return self.made[name]


def kernel_use(shape: tuple[int, ...]) -> str:
    """How `Factors.note` calls the use as a kernel of this shape."""
    return f"kernel{shape[2:]}"


def emit(expr: Expr, factors: Factors, tape: Tape) -> ir.Value:
    """Nodes that compute an expression; gives its value."""
    from tiedconv.core import expr as e

    if isinstance(expr, Ref):
        return factors.whole(expr.name)
    inputs = [emit(child, factors, tape) for child in expr.children]
    match expr:
        case e.Permute(dims=dims):
            return tape.op("Transpose", inputs, {"perm": list(dims)})
        case e.Reshape(to=to):
            return tape.op("Reshape", [*inputs, numbers(tape, to)])
        case e.Slice(dim=dim, start=start, stop=stop):
            ends = [numbers(tape, [n]) for n in (start, stop, dim)]
            return tape.op("Slice", [*inputs, *ends])
        case e.Cat(dim=dim):
            return tape.op("Concat", inputs, {"axis": dim})
        case e.Add():
            return tape.op("Add", inputs)
        case e.Mul():
            return tape.op("Mul", inputs)
        case e.MatMul():
            return tape.op("MatMul", inputs)
    raise AssertionError(expr)


def numbers(tape: Tape, values: object) -> ir.Value:
    """A constant of whole numbers."""
    import onnx_ir as ir

    tensor = ir.Tensor(np.array(values, dtype=np.int64))
    return tape.op("Constant", [], {"value": tensor})


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's numbers, contiguous; numpy has no bfloat16, so ml_dtypes' stands in."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
