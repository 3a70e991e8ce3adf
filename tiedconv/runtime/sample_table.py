"""Samples of any form as a table, from which a hook feeds a model that is called with numbers.

It is also what knows which tokens of the last batch are padding: `attention_mask` beside
`input_ids`. They are nothing that a model is meant to say, so neither statistics nor distances
count them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.runtime.call_hooks import Feeds

IMAGE = ""
"""The name of an input that is given by place."""

Rows = Tensor | Sequence[Tensor]
"""An entry of all samples, `(samples, ...)`; a list where they differ in shape."""

_TOKENS, _MASK = "input_ids", "attention_mask"


class SampleTable(Feeds):
    """Calls a model with the samples of given numbers.

    Args:
        table: the entries by the names of the model's arguments.
    """

    def __init__(self, table: Mapping[str, Rows]) -> None:
        self.table = table
        self.kept: Tensor | None = None
        """Of the last call, see `kept_of`."""

    def __len__(self) -> int:
        return len(next(iter(self.table.values())))

    def shapes(self, number: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a sample's entries."""
        return {name: tuple(entry[number].shape) for name, entry in self.table.items()}

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1 or kwargs:
            return None  # it is called by names already
        numbers = args[0].flatten()
        given = {n: _rows(t, numbers.cpu()).to(numbers.device) for n, t in self.table.items()}
        self.kept = self.kept_of(numbers)
        image = given.pop(IMAGE, None)
        return (() if image is None else (image,)), given

    def kept_of(self, numbers: Tensor) -> Tensor | None:
        """Which tokens of some samples count, `(samples, tokens)` bool.

        None where all do, and where a second text of the same length has another padding: a tensor
        of as many tokens could be of either.

        Args:
            numbers: of samples whose entries have the same shapes.
        """
        index = numbers.flatten().cpu()
        tokens, mask = (
            None if self.table.get(name) is None else _rows(self.table[name], index)
            for name in (_TOKENS, _MASK)
        )
        if tokens is None or mask is None or mask.ndim != 2 or tokens.shape != mask.shape:
            return None
        kept = mask > 0
        if bool(kept.all()) or not bool(kept.any(1).all()):
            return None
        for name in self.table:
            if name.endswith(_TOKENS) and name != _TOKENS:
                other = self.table.get(name.replace(_TOKENS, _MASK))
                same = other is not None and torch.equal(_rows(other, index) > 0, kept)
                if not same and _rows(self.table[name], index).shape == tokens.shape:
                    return None
        return kept.to(numbers.device)


def kept_tokens(model: Any) -> Tensor | None:
    """Which tokens of the batch that a model saw last are not padding; None where all count."""
    table = table_of(model)
    return None if table is None else table.kept


def table_of(model: Any) -> SampleTable | None:
    """What feeds a model, if it is called with the numbers of samples."""
    hooks = model._forward_pre_hooks.values() if isinstance(model, nn.Module) else ()
    return next((hook for hook in hooks if isinstance(hook, SampleTable)), None)


def _rows(entry: Rows, index: Tensor) -> Tensor:
    return entry[index] if isinstance(entry, Tensor) else torch.stack([entry[i] for i in index])
