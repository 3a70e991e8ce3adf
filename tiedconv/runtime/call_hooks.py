"""Hooks that change what a model takes and returns, while it is calibrated or distilled.

All else calls a model with one tensor that holds an entry for each image, and compares what it
returns. A model that wants several inputs, draws random numbers, or returns more than is meant,
gets hooks for the time of a run. A copy of the model keeps them; a file never holds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.runtime.outputs import chosen, named_outputs

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[nn.Module, Any, Any], Any]
Pick = str | Sequence[str] | Callable[[Any], Any]
"""What of an output is meant: names, listed or with commas between, or a function of the whole."""

TEXT_LENGTH = 16
"""Tokens of a random text, at most, where its length does not matter."""

LONGEST = 4096
"""Tokens of a text where the model says how many it takes."""


class Shared:
    """A hook that copies of a model share, as it has no state of its own."""

    def __deepcopy__(self, memo: object) -> Any:
        return self


class Feeds(Shared):
    """A hook that gives a model what it takes besides its first input, or in its place."""


class RandomText(Feeds):
    """Gives a model that takes images and text a random text beside each image.

    The token ids depend on the image alone, so that a model and its original read the same text.
    """

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs or args[0].ndim != 4:
            return None
        return (), {"pixel_values": args[0], "input_ids": random_text(model, args[0])}


class ChosenOutput(Shared):
    """Returns only a part of what a model returns.

    Args:
        pick: see `Pick`.
    """

    def __init__(self, pick: Pick) -> None:
        self.pick = pick

    def __call__(self, model: nn.Module, args: Any, output: Any) -> Any:
        """The chosen part.

        Raises:
            UserError: there is no output of that name (`unknown-output`).
        """
        if callable(self.pick):
            return self.pick(output)
        names = self.pick.split(",") if isinstance(self.pick, str) else list(self.pick)
        return chosen(named_outputs(output), names)


@contextmanager
def hooked(
    model: nn.Module, before: Sequence[Before] = (), after: Sequence[After] = ()
) -> Iterator[None]:
    """Within it a model, and copies made of it, have these hooks.

    Args:
        model: any.
        before: change its arguments, in this order.
        after: change its output, in this order.
    """
    with ExitStack() as stack:
        for change in before:
            handle: Any = model.register_forward_pre_hook(change, with_kwargs=True)
            stack.callback(handle.remove)
        for select in after:
            handle = model.register_forward_hook(select)
            stack.callback(handle.remove)
        yield


@contextmanager
def one_seed(images: Tensor | None, seed: int) -> Iterator[None]:
    """Within it random numbers are those of the seed: some models mask their images at random."""
    devices = [images.device] if images is not None and images.is_cuda else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Within it a model draws the same random numbers in each call, and leaves torch's alone."""
    seeded = _Seeded()
    before: Any = model.register_forward_pre_hook(seeded.begin)
    after: Any = model.register_forward_hook(seeded.end, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


class _Seeded(Shared):
    def __init__(self) -> None:
        self._open: list[ExitStack] = []

    def begin(self, model: nn.Module, args: Any) -> None:
        given = next((x for x in args if isinstance(x, Tensor)), None)
        stack = ExitStack()
        stack.enter_context(one_seed(given, 0))
        self._open.append(stack)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._open:  # a hook before this one may have failed
            self._open.pop().close()


def is_fed(model: Any) -> bool:
    """Whether hooks give a model what it takes besides its first input."""
    hooks = model._forward_pre_hooks.values() if isinstance(model, nn.Module) else ()
    return any(isinstance(hook, Feeds) for hook in hooks)


def takes_text_too(model: nn.Module) -> bool:
    """Whether a model of transformers takes token ids and images (`pixel_values`), as CLIP does."""
    names = inspect.signature(model.forward).parameters
    return "pixel_values" in names and next(iter(names)) == "input_ids"


def text_hooks(model: nn.Module) -> list[Before]:
    """What lets a model be called with images alone: random text, where it takes text too."""
    return [RandomText()] if takes_text_too(model) else []


def random_text(model: nn.Module, images: Tensor, most: int = TEXT_LENGTH) -> Tensor:
    """Token ids `(images, tokens)`, drawn from the whole vocabulary by the pixels of each image.

    They begin and end with the tokens that the model's configuration names.

    Args:
        model: of transformers.
        images: `(n, C, H, W)`.
        most: tokens of a text, if the model takes as many.
    """
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    size = int(getattr(config, "vocab_size", 0) or 1)
    length = min(most, int(getattr(config, "max_position_embeddings", 0) or TEXT_LENGTH))
    rows = []
    for image in images.detach().double().flatten(1).cpu():
        seed = hash(float(image.sum())) % 2**63
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randint(size, (length,), generator=generator))
    text = torch.stack(rows)
    for place, name in ((0, "bos_token_id"), (-1, "eos_token_id")):
        token = getattr(config, name, None)
        if isinstance(token, int) and 0 <= token < size:
            text[:, place] = token
    return text.to(images.device)
