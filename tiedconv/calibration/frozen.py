"""Models in evaluation mode and without gradients, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from tiedconv.training.batchnorm import modes_kept


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode whose parameters require no gradient; restored afterwards."""
    flags = [(p, p.requires_grad) for model in models for p in model.parameters()]
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(modes_kept(model))
        try:
            for model in models:
                model.eval().requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
