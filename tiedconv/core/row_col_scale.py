"""A matrix with scales for its rows and its columns, and a cheaper gradient of them.

Left to itself torch keeps the half-scaled matrix for the backward pass, and goes over memory about
twice as often there; where the gradient comes transposed, as it does for a weight that is another
one's transpose, each time against the order of the elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`matrix * rows * columns`, to the bit.

    Args:
        matrix: shape (r, c).
        rows: shape (r, 1).
        columns: shape (1, c).
    """
    if not torch.is_grad_enabled():
        return (matrix * rows).mul_(columns)
    # A compiler makes one kernel of it by itself, and an exporter needs plain operations.
    if torch.compiler.is_compiling():
        return matrix * rows * columns
    product: Tensor = _Scaled.apply(matrix, rows, columns)  # type: ignore[no-untyped-call]
    return product


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return (matrix * rows).mul_(columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        matrix, rows, columns = ctx.saved_tensors
        (given,) = gradients
        wants_matrix, wants_rows, wants_columns = ctx.needs_input_grad
        # In the order of the matrix, once. Nothing is overwritten if this is differentiated too.
        again = torch.is_grad_enabled()
        copied = not given.is_contiguous()
        gradient = given.contiguous()
        of_matrix = of_rows = of_columns = None
        if wants_rows or wants_columns:
            both = gradient * matrix
            of_rows = both @ columns.mT if wants_rows else None
            of_columns = rows.mT @ both if wants_columns else None
        if wants_matrix:
            if again:
                of_matrix = gradient * rows * columns
            else:
                half = gradient.mul_(rows) if copied else gradient * rows
                of_matrix = half.mul_(columns)
        return of_matrix, of_rows, of_columns
