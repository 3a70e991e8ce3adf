"""Baseline: layers of a stack share one matrix; LORS without residuals.

As in Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations"
(https://arxiv.org/abs/1909.11942).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiedconv.core.expr import Ref
from tiedconv.core.plan import Block
from tiedconv.schemes._base import Draft, Layout
from tiedconv.schemes._matched import LayersMatched
from tiedconv.schemes._stacks import stacks


@dataclass(frozen=True)
class Shared(LayersMatched):
    """One matrix for each group of a stack: the mean of its layers, after aligning them.

    Args:
        groups: which layers share: `all`, `adjacent:N` or `cycle:N`.
        match: align layers before taking the mean.
    """

    name: ClassVar[str] = "shared"
    pattern: ClassVar[str] = "stacks of at least two layers of one shape"
    smaller_options: ClassVar = ({"groups": "adjacent:3"}, {"groups": "all"})

    groups: str = "adjacent:2"
    match: bool = True

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        for name, members in stacks(blocks, self.groups, fused=True):
            if len(members) > 1:
                yield Draft(name, self, members)

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        return Layout({"base": shapes[0]}, (Ref("base", shapes[0]),) * len(shapes))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"base": torch.stack(list(matrices)).mean(0)}


SCHEME = Shared
