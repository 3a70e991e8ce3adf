"""`torch.compile` on request, with a fallback to eager execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiedconv.data import Loader
from tiedconv.errors import first_line
from tiedconv.training.throughput import rolled_back, warmup_batches
from tiedconv.training.train_step import TrainStep


class CompiledOrEager:
    """A forward pass that is either compiled or eager.

    Args:
        eager: the model's forward pass.
    """

    def __init__(self, eager: Callable[..., Any]) -> None:
        self.eager = eager
        self.current = eager

    def __call__(self, images: Tensor, **more: Any) -> Any:
        return self.current(images, **more)


def compile_if_possible(call: CompiledOrEager, updater: TrainStep, loader: Loader) -> str | None:
    """Compiles a forward pass and its backward pass, which are run once to see that they work.

    Args:
        call: is switched to the compiled form.
        updater: runs both passes, through `call`.
        loader: of the training images.

    Returns:
        why it stayed eager, in this or another process; None if it is compiled.
    """
    if updater.config.features > 0:
        return "features are taken from the outputs of blocks, which compiled code does not keep"
    call.current = torch.compile(call.eager)
    reason: str | None = None
    try:
        with rolled_back(updater):
            batch = next(warmup_batches(loader))
            # Without exchange: where one process fails, the others must not wait for its gradients.
            float(updater.backward(batch.images, batch.labels, 0, 1.0, exchange=False))
    except (RuntimeError, ImportError, OSError) as error:  # of torch, triton, a C++ compiler
        reason = first_line(error)[:200]
    (failed,) = updater.processes.any([reason is not None], updater.placement.device)
    if not failed:
        return None
    call.current = call.eager
    torch._dynamo.reset()
    return reason or "another process could not compile it"
