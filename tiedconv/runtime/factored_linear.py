"""Running a tied model in the memory of its stored tensors: no weight is materialised.

`x (B A)^T = (x A^T) B^T`: with low ranks this is also faster. With a base and a residual it takes
more products than the weight itself, but materialising the weight costs `out * in * rank` in each
run, whatever the number of rows of features. Which is cheaper follows from the shapes and the
number of rows, and `apply_factors` chooses by it.
"""

from __future__ import annotations

import math

from torch import nn

from tiedconv.core.expr import Expr
from tiedconv.runtime.flops import apply_flops, materialize_flops
from tiedconv.runtime.tie import tied_weights
from tiedconv.runtime.tied_module import Forward, forward_of, set_forward


def apply_factors(model: nn.Module, rows: int | None = None) -> list[str]:
    """Let the linear layers of a tied model apply factors one by one, in place, for inference.

    Training uses the weights as before: only evaluation without gradients changes. Layers where
    applying takes more time than materialising the weight keep materialising it, one layer at a
    time. Weights of generators (scheme lors-adaptive) are never materialised, with or without this.
    `untie` undoes it.

    Args:
        model: tied.
        rows: rows of features that a layer sees at a time, images times tokens; None to apply
            factors wherever possible, for the least memory.

    Returns:
        names of the weights that are not materialised for inference.
    """
    found: list[str] = []
    for name, module, attribute, expr in tied_weights(model):
        forward = forward_of(module)
        if attribute != "weight" or forward is None:
            continue
        if forward is not Forward.FACTORED:
            is_less = _takes_less(expr, rows)
            set_forward(module, Forward.FACTORED_INFERENCE if is_less else Forward.MATERIALIZED)
            if not is_less:
                continue
        found.append(name)
    return found


def _takes_less(expr: Expr, rows: int | None) -> bool:
    """Whether factors can be applied, in less time than the weight takes for so many rows."""
    flops = None if expr.is_view else apply_flops(expr)
    if flops is None or rows is None:
        return flops is not None
    return rows * flops < rows * math.prod(expr.shape) + materialize_flops(expr)
