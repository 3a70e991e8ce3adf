"""Running a tied model in the memory of its stored tensors: factors applied, weights never made.

`x (B A)^T = (x A^T) B^T`: with low ranks it is also faster. With a base and a residual it takes
more products than the weight itself, but the weight is made anew in each run: that costs
`out * in * rank` once, so the more rows of features there are, the less it matters. What is
cheaper is known from shapes and the number of rows, and `apply_factors` chooses by it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Expr, MatMul
from tiedconv.runtime.factored import multiplications
from tiedconv.runtime.factored_torch import linear
from tiedconv.runtime.tie import is_frozen, tied_weights
from tiedconv.runtime.tied_module import is_applied, lookup_of

_APPLIED = "_tiedconv_applied"


def apply_factors(model: nn.Module, rows: int | None = None) -> list[str]:
    """Let the linear layers of a tied model apply factors one by one, in place, for inference.

    Training uses the weights as before: only evaluation without gradients changes. Layers where
    that takes more time than making the weight keep making it, one layer at a time. Weights of
    generators (scheme lors-adaptive) are never made, with or without this.

    Args:
        model: tied.
        rows: of features that a layer sees at a time, images times tokens; None to apply factors
            wherever it can be done, for the least memory.

    Returns:
        names of the weights that are never made.
    """
    found: list[str] = []
    for name, module, attribute, expr in tied_weights(model):
        if is_applied(module, attribute):
            found.append(name)
            continue
        if attribute != "weight" or type(module).forward is not nn.Linear.forward:
            continue
        cost = multiplications(expr)
        if cost is None or expr.is_view:
            continue
        if rows is None or rows * cost < rows * math.prod(expr.shape) + making(expr):
            module.__dict__[_APPLIED] = expr
            module.forward = _Forward(module)
            found.append(name)
    return found


def make_weights(model: nn.Module) -> None:
    """Undo `apply_factors`, in place."""
    for module in model.modules():
        if module.__dict__.pop(_APPLIED, None) is not None:
            del module.__dict__["forward"]


def making(expr: Expr) -> int:
    """Multiplications that it takes to make a weight."""
    total = 0
    for node in expr.walk():
        if isinstance(node, MatMul):
            total += math.prod(node.shape) * node.a.shape[-1]
        elif not node.children:
            continue
        else:
            total += math.prod(node.shape)
    return total


class _Forward:
    """The forward pass of one linear layer, by its factors."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        module = self.module
        if torch.is_grad_enabled() or module.training or is_frozen(module, "weight"):
            made: Tensor = type(module).forward(module, x)
            return made
        expr: Expr = module.__dict__[_APPLIED]
        y = linear(expr, x, lookup_of(module))
        bias: Any = module.bias
        return y if bias is None else y.add_(bias)
