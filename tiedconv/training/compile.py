"""`torch.compile` on request, and training without it where that can't be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiedconv.data import Loader
from tiedconv.errors import TiedconvError
from tiedconv.training.throughput import probes, undone
from tiedconv.training.train_step import TrainStep


class CompiledOrEager:
    """A call that is either compiled or plain.

    Args:
        plain: the model's forward pass.
    """

    def __init__(self, plain: Callable[..., Any]) -> None:
        self.plain = plain
        self.current = plain

    def __call__(self, images: Tensor, **more: Any) -> Any:
        return self.current(images, **more)


def compile_if_possible(call: CompiledOrEager, updater: TrainStep, loader: Loader) -> str | None:
    """Compiles a forward pass, and its backward pass; tried in one step, which is then undone.

    Args:
        call: is switched over.
        updater: takes the step, through `call`.
        loader: of the training images.

    Returns:
        why it stayed plain; None if it is compiled.
    """
    if updater.config.features > 0:
        return "features are taken from the outputs of blocks, which compiled code does not keep"
    call.current = torch.compile(call.plain)
    try:
        with undone(updater):
            batch = next(probes(loader))
            float(updater.step(batch.images, batch.labels, updater.config.lr, 0, 1.0))
        return None
    except TiedconvError:
        raise
    except Exception as error:  # a compiler fails in any way that its many parts may
        call.current = call.plain
        torch._dynamo.reset()
        text = str(error).strip().splitlines()
        return text[0][:200] if text else type(error).__name__
