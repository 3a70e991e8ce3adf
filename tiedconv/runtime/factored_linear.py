"""Running a tied model in the memory of its stored tensors: no weight is materialised.

`x (B A)^T = (x A^T) B^T`: with low ranks this is also faster. With a base and a residual it takes
more products than the weight itself, but materialising the weight costs `out * in * rank` in each
run, whatever the number of rows of features. Which is cheaper follows from the shapes and the
number of rows, and `apply_factors` chooses by it. With weights that are cached, only the products
count, which is what a budget of multiply-adds assumes.
"""

from __future__ import annotations

import math

from torch import nn

from tiedconv.core.expr import Expr
from tiedconv.runtime.flops import apply_flops, fewest_macs, materialize_flops
from tiedconv.runtime.tie import cache_weights, tied_weights
from tiedconv.runtime.tied_module import Forward, forward_of, set_forward


def apply_factors(
    model: nn.Module, rows: int | None = None, *, cache: bool = False
) -> list[str]:  # fmt: skip
    """Let the layers of a tied model apply factors one by one, in place, for inference.

    Training uses the weights as before: only evaluation without gradients changes. Layers where
    applying takes more time than materialising the weight keep materialising it, one layer at a
    time. Weights of generators (scheme lors-adaptive) are never materialised, with or without this.
    Linear layers, attentions and convolutions of torch (of one group) can apply factors, and the
    `Conv1D` of transformers; any other layer uses its weight.
    `untie` undoes it.

    Args:
        model: tied.
        rows: rows of features that a layer sees at a time, images times tokens (for a convolution,
            positions of its output); None to apply factors wherever possible, for the least memory.
        cache: for the fewest multiply-adds, those that `--macs` counts: a layer applies factors
            where that takes fewer than its weight does, whatever `rows` says, and the weights of
            all other layers are computed once, as `freeze` does. The model is in eval mode then.

    Returns:
        names of the weights that are not materialised for inference.
    """
    found: list[str] = []
    able: set[nn.Module] = set()
    refused: set[nn.Module] = set()
    for name, module, attribute, expr in tied_weights(model):
        forward = forward_of(module, attribute)
        if forward is None:
            continue
        if forward is not Forward.FACTORED:
            is_less = fewest_macs(expr)[1] if cache else _takes_less(expr, rows)
            if not is_less:
                refused.add(module)
                continue
            able.add(module)
        found.append(name)
    for module in able | refused:
        set_forward(module, Forward.FACTORED_INFERENCE if module in able else Forward.MATERIALIZED)
    if cache:
        cache_weights(model, apart_from=found)
    return found


def _takes_less(expr: Expr, rows: int | None) -> bool:
    """Whether factors can be applied, in less time than the weight takes for so many rows."""
    flops = None if expr.is_view else apply_flops(expr)
    if flops is None or rows is None:
        return flops is not None
    return rows * flops < rows * math.prod(expr.shape) + materialize_flops(expr)
