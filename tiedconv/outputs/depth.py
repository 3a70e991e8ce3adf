"""Depth maps, as monocular depth estimation gives them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.outputs.features import Features
from tiedconv.runtime.outputs import named_outputs

_NAMES = ("predicted_depth", "depth")
_RATIO = 1.25
"""Two depths that differ by less are counted as the same: delta-1 of the field (Eigen et al.,
arXiv 1406.2283)."""


class Depth(Features):
    """A map (B, H, W) or (B, 1, H, W), compared as a whole: half the relative squared error.

    Features would take each line of pixels for a token of its own.
    """

    name = "depth"
    compares = "depth within a quarter"
    counts = True
    last = False

    def matches(self, output: Any, model: nn.Module) -> bool:
        found = _map_in(output)
        return found is not None and found.ndim in (3, 4)

    def values(self, output: Any) -> list[Tensor]:
        found = _map_in(output)
        assert found is not None  # as `matches` found
        return [found.float().flatten(1).unsqueeze(1)]

    @torch.no_grad()
    def agreement(self, output: Any, answer: Any, model: nn.Module) -> Tensor:
        (found,), (known,) = self.values(output), self.values(answer)
        ratio = found / known
        same = (ratio > 1 / _RATIO) & (ratio < _RATIO)
        return (same | (found == known)).float().mean((1, 2))


def _map_in(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return None  # a bare map may be anything
    try:
        found = named_outputs(output)
    except Exception:  # named_outputs refuses what holds no tensor
        return None
    return next((found[name] for name in _NAMES if name in found), None)


OUTPUT = Depth()
