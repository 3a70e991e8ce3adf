"""LORS, static: stacked layers share a base and have a low-rank residual each.

    W_i = base + B_i A_i

Li et al., "LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking", equation 4
(https://arxiv.org/abs/2403.04303).

A sum of K rank-r terms, as the paper writes it, is one term of rank K r: `k` lists K for each
layer. Convolutions take part as matrices of shape `(out, in * kh * kw)`. Biases and norms are not
shared. From pretrained weights, the base is their mean and the residuals are the truncated SVD of
the differences, improved by turns; `match` first puts each layer's hidden units, heads and head
bases in the order that agrees best with the layers before it, which leaves the model's outputs as
they are.

Beyond the paper: `bases` gives each layer its own mixture of several bases,
`W_i = sum_k c_ik base_k + B_i A_i`, and `base_rank` stores the base as a product of two
factors; an unmatched layer is then a low-rank base by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tiedconv.core.expr import Add, Expr, Mul, Ref, Shape, Slice
from tiedconv.core.plan import Block
from tiedconv.errors import SchemeError
from tiedconv.numerics.linalg import base_and_residuals, bases_and_residuals
from tiedconv.schemes._base import (
    Draft,
    FactoredBase,
    Layout,
    Ranked,
    Scheme,
    with_residual,
)
from tiedconv.schemes._matched import LayersMatched
from tiedconv.schemes._stacks import stacks


@dataclass(frozen=True)
class Lors(LayersMatched, FactoredBase, Ranked):
    """One base for each group of a stack, a residual for each layer.

    Args:
        rank: of the residuals: a number, a fraction of a layer's parameters (below 1), or a list.
        k: multipliers of `rank`, one for each layer of the group (the paper's K list).
        groups: which layers share a base: `all`, `adjacent:N` or `cycle:N`.
        bases: how many bases a group has; each layer mixes them.
        base_rank: rank of the base: a number, or a fraction of its parameters (below 1); 0 stores
            it as it is.
        fused: take a fused qkv as one matrix.
        match: align layers before the fit.
    """

    name: ClassVar[str] = "lors"
    base_name: ClassVar[str] = "base"
    pattern: ClassVar[str] = "stacks of at least two layers of one shape"
    smaller_options: ClassVar = ({"rank": 0},)

    rank: int | float | tuple[int, ...] = 0.2
    groups: str = "all"
    bases: int = 1
    fused: bool = True
    match: bool = True

    def __post_init__(self) -> None:
        if self.bases < 1 or (self.bases > 1 and self.base_rank):
            raise SchemeError(
                f"Scheme lors can't combine bases={self.bases} and base_rank={self.base_rank}",
                hint="Use bases=1 or more, and base_rank with one base only",
                code="invalid-bases",
            )

    def alternatives(self) -> tuple[Scheme, ...]:
        return super().alternatives() if self.bases == 1 else ()

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        longest = 0
        for name, members in stacks(blocks, self.groups, fused=self.fused):
            longest = max(longest, len(members))
            if len(members) > max(1, self.bases):
                yield Draft(name, self, members)
            elif len(members) == 1 and self.base_rank:  # its own base, and no residual beside it
                yield Draft(name, replace(self, rank=0, k=()), members)
        if 1 < longest <= self.bases:
            raise SchemeError(
                f"bases={self.bases} is too many for stacks of at most {longest} layers",
                "Each layer would have a base of its own",
                f"Use less than {longest} bases",
                code="too-many-bases",
            )

    def rank_slots(self, count: int) -> list[bool]:
        return [count > 1] * count

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        factors: dict[str, Shape] = {}
        bases = self._bases(factors, shapes[0], len(shapes))
        weights = [
            with_residual(factors, base, j, rank, shape)
            for j, (base, rank, shape) in enumerate(
                zip(bases, self.ranks(shapes), shapes, strict=True)
            )
        ]
        return Layout(factors, tuple(weights))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        ranks = self.ranks([(m.shape[0], m.shape[1]) for m in matrices])
        if self.bases == 1:
            base, pairs = base_and_residuals(matrices, ranks)
            factors = self.stored(base)
        else:
            bases, mix, pairs = bases_and_residuals(matrices, ranks, self.bases)
            factors = {f"base{k}": b for k, b in enumerate(bases)} | {"mix": mix}
        for j, (b, a) in enumerate(pairs):
            if ranks[j]:
                factors |= {f"B{j}": b, f"A{j}": a}
        return factors

    def residuals(self, matrices: Sequence[Tensor]) -> Iterator[Tensor | None]:
        none = [0] * len(matrices)
        if self.bases == 1:
            base, _ = base_and_residuals(matrices, none)
            for m in matrices:
                yield m - base
            return
        bases, mix, _ = bases_and_residuals(matrices, none, self.bases)
        for m, row in zip(matrices, mix, strict=True):
            yield m - sum(c * b for c, b in zip(row, bases, strict=True))

    def _bases(self, factors: dict[str, Shape], shape: tuple[int, int], count: int) -> list[Expr]:
        """The base of each layer as an expression; adds what is stored."""
        if self.bases == 1:
            return [self.store(factors, shape)] * count
        bases = [Ref(f"base{k}", shape) for k in range(self.bases)]
        mix = Ref("mix", (count, self.bases))
        factors |= {b.name: b.of for b in [*bases, mix]}

        def coefficient(j: int, k: int) -> Expr:
            return Slice(Slice(mix, 0, j, j + 1), 1, k, k + 1)

        mixed: list[Expr] = []
        for j in range(count):
            total: Expr = Mul(bases[0], coefficient(j, 0))
            for k in range(1, self.bases):
                total = Add(total, Mul(bases[k], coefficient(j, k)))
            mixed.append(total)
        return mixed


SCHEME = Lors
