"""LORS, adaptive: stacked weight generators share one and have Tucker-2 terms each.

    W_i^g(q) = base^g(q) + sum_k B_ik^g E_ik(q) A_ik^g

Li et al., "LORS: Low-rank Residual Structure for Parameter-Efficient Network Stacking", adaptive
form (https://arxiv.org/abs/2403.04303).

A generator is a linear layer whose output is a weight: rows `groups * out * in`, columns the width
of q. E_ik(q) is a small generator, of (rank, rank), shared by the groups of the layer. At run time
the factors are applied to q, in training as well; the generator of a layer is never materialised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block
from tiedconv.errors import NothingToConvert
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.schemes._base import Draft, Layout, RankOption, Scheme
from tiedconv.schemes._generators import Form, is_linear
from tiedconv.schemes._stacks import stacks


@dataclass(frozen=True)
class LorsAdaptive(Scheme):
    """One base generator for each group of a stack, terms of a given rank for each layer.

    Args:
        shape: (out, in) of the matrices that are generated; required.
        rank: of a term: a number, or a fraction of the larger side of `shape` (below 1).
        k: terms of each layer of the group (the paper's K list), 1 for all if empty. With a budget
            it is the number of terms that is chosen, at the given rank.
        groups: which layers share a base: `all`, `adjacent:N` or `cycle:N`.
        scratch: draw the factors as the paper does for training from scratch, rather than fit them.
    """

    name: ClassVar[str] = "lors-adaptive"
    pattern: ClassVar[str] = (
        "stacks of at least two linear layers that generate matrices of the option shape"
    )

    shape: tuple[int, ...] = ()
    rank: int | float = 0.125
    k: tuple[int, ...] = ()
    groups: str = "all"
    scratch: bool = False

    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        if blocks and not self.shape:
            raise NothingToConvert(
                "Scheme lors-adaptive needs the option shape, of the matrices that are generated",
                "A weight's rows are groups * out * in, which does not determine it",
                "Add --option shape=OUT,IN and limit the rule with --include to the generators",
                code="shape-missing",
            )
        for name, members in stacks(blocks, self.groups, fused=True):
            if len(members) > 1 and all(map(is_linear, members)):
                draft = Draft(name, self, members)
                self._form(draft.shapes, members[0].slot.tensor)
                yield draft

    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        factors: dict[str, Shape] = {}
        form = self._form(shapes)
        return Layout(factors, form.layout(factors, form.terms(self.k, len(shapes))))

    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        form = self._form([(m.shape[0], m.shape[1]) for m in matrices])
        make = form.drawn if self.scratch else form.fitted
        return make(matrices, form.terms(self.k, len(matrices)))

    def with_residual_ranks(self, ranks: Sequence[int]) -> Scheme:
        return dataclasses.replace(self, k=tuple(ranks))

    def rank_slots(self, count: int) -> list[bool]:
        return [True] * count

    def rank_options(self, shapes: Sequence[tuple[int, int]]) -> list[RankOption | None]:
        # A term of rank r stores r^2 values per entry of q: the parameters of one more rank depend
        # on r, those of one more term do not.
        return [*[self._form(shapes).rank_option] * len(shapes), None]

    def gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> list[Tensor | None]:  # fmt: skip
        form = self._form([(m.shape[0], m.shape[1]) for m in matrices])
        return [*form.gains(matrices, metrics), None]

    def _form(self, shapes: Sequence[tuple[int, int]], where: str = "A layer") -> Form:
        return Form.of(self.shape, self.rank, shapes[0], where)


SCHEME = LorsAdaptive
