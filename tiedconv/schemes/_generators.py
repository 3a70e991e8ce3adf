"""Weight generators as adaptive LORS stores them: sizes, expressions, fits, first values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.core.expr import Add, Expr, Ref, Shape
from tiedconv.core.plan import Member
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.runtime.generator import generate
from tiedconv.schemes._base import RankOption
from tiedconv.schemes._tucker import Term, block_energies, fit_stack

# Columns of B per row of a layer's matrices, at most: far above what saves anything, and below the
# limit at which the reader of a file refuses an expression as too expensive.
MOST_COLUMNS = 4


def is_linear(member: Member) -> bool:
    """Whether this is the whole weight of a linear layer."""
    slot = member.slot
    return not slot.kernel and not slot.transposed and slot.rows == slot.shape[0]


@dataclass(frozen=True)
class Form:
    """A generator's sizes: it makes `groups` matrices (out, inputs) from a query of `width`.

    Args:
        rank: of the terms of one layer.
    """

    groups: int
    out: int
    inputs: int
    width: int
    rank: int

    @classmethod
    def of(
        cls, made: Sequence[int], rank: int | float, shape: tuple[int, int], where: str
    ) -> Form:  # fmt: skip
        """The form of a layer whose weight is of this shape, whose name is `where`.

        Args:
            made: (out, in) of the matrices that it makes.
            rank: a number, or a fraction of the larger side (below 1).

        Raises:
            SchemeError: the rows are not a multiple of a matrix, or an option is invalid.
        """
        if len(made) != 2 or min(made) < 1:
            raise SchemeError(
                f"Invalid shape={list(made)}",
                "The matrices that the generators make are not known",
                "Give [out, in] of the matrices that they generate, such as [128, 128]",
                code="invalid-shape",
            )
        rows, width = shape
        if rows % math.prod(made):
            raise SchemeError(
                f"{where} has {rows:,} rows, which is not a multiple of the {math.prod(made):,} "
                f"values of a matrix of shape {made[0]} x {made[1]}",
                "It can't be a generator of such matrices",
                "Give the shape that it generates, or limit the rule with include to generators",
                code="not-a-generator",
            )
        if not 0 < rank < math.inf:
            raise SchemeError(
                f"Invalid rank={rank}",
                hint="Use a whole number from 1 on, or a fraction below 1",
                code="invalid-rank",
            )
        columns = int(rank if rank >= 1 else max(1, rank * max(made)))
        return cls(rows // math.prod(made), made[0], made[1], width, min(columns, max(made)))

    @property
    def rank_option(self) -> RankOption:
        """What a budget chooses: the number of terms, at the given rank."""
        r = self.rank
        cost = r * r * self.width + self.groups * r * (self.out + self.inputs)
        whole = self.groups * self.out * self.inputs * self.width
        full = math.ceil(self.groups * self.out / r) * math.ceil(self.inputs / r)
        return RankOption(cost, 0, min(full, whole // cost, MOST_COLUMNS * self.out // r), full)

    def terms(self, k: Sequence[int], count: int) -> tuple[int, ...]:
        """How many terms each of so many layers has.

        Raises:
            SchemeError: `k` is for another number of layers, or asks for too many terms.
        """
        if k and len(k) != count:
            raise SchemeError(
                f"k lists {len(k)} numbers of terms, but a group has {count} layers",
                hint="Give one for each layer, or limit the rule with include",
                code="wrong-rank-count",
            )
        most = MOST_COLUMNS * self.out // self.rank
        if any(not 0 <= n <= most for n in k):
            raise SchemeError(
                f"Invalid k={list(k)}",
                f"Each term adds rank {self.rank} to matrices of {self.out} rows",
                f"Use 0 to {most} for each layer, or another rank",
                code="invalid-rank",
            )
        return tuple(k) or (1,) * count

    def layout(self, factors: dict[str, Shape], terms: Sequence[int]) -> tuple[Expr, ...]:
        """The weight of each layer; adds what is stored."""
        rows = self.groups * self.out * self.inputs
        base, r = Ref("base", (rows, self.width)), self.rank
        factors["base"] = base.of
        weights: list[Expr] = []
        for j, n in enumerate(terms):
            if not n:
                weights.append(base)
                continue
            e = Ref(f"E{j}", (n * r * r, self.width))
            b = Ref(f"B{j}", (self.groups * self.out, n * r))
            a = Ref(f"A{j}", (self.groups * n * r, self.inputs))
            factors |= {ref.name: ref.of for ref in (e, b, a)}
            weights.append(Add(base, generate(e, b, a, self.groups, n)))
        return tuple(weights)

    def fitted(self, matrices: Sequence[Tensor], terms: Sequence[int]) -> dict[str, Tensor]:
        """The factors nearest to these generators."""
        base, found, _ = fit_stack([self._tensor(m) for m in matrices], terms, self.rank)
        factors = {"base": base.reshape(-1, self.width)}
        for j, mine in enumerate(found):
            factors |= self._stored(j, mine)
        return factors

    def drawn(self, matrices: Sequence[Tensor], terms: Sequence[int]) -> dict[str, Tensor]:
        """First values for training from scratch: B 0, A and E by Kaiming.

        The base is the first layer's weight as its model draws it; the paper's model makes it 0.
        The paper makes E 0, too, and its bias moves the layer off that: here E may have no bias,
        and with B and E both 0 neither would ever have a gradient.
        """
        generator = torch.Generator().manual_seed(0)
        like, r = matrices[0], self.rank

        def kaiming(*shape: int) -> Tensor:
            drawn = torch.empty(shape).uniform_(-1, 1, generator=generator)
            return drawn.mul_(float(shape[-1]) ** -0.5).to(like.dtype)

        factors = {"base": like.clone()}
        for j, n in enumerate(terms):
            if n:
                factors[f"E{j}"] = kaiming(n * r * r, self.width)
                factors[f"B{j}"] = like.new_zeros(self.groups * self.out, n * r)
                factors[f"A{j}"] = kaiming(self.groups * n * r, self.inputs)
        return factors

    def gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> list[Tensor | None]:  # fmt: skip
        """For each layer, the cost that each further term removes at least."""
        base = sum(matrices[1:], matrices[0]) / len(matrices)
        return [
            0.5 * block_energies(self._tensor(metric.whiten(m - base)), self.rank)
            for m, metric in zip(matrices, metrics, strict=True)
        ]

    def _tensor(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.groups, self.out, self.inputs, self.width)

    def _stored(self, j: int, terms: Sequence[Term]) -> dict[str, Tensor]:
        if not terms:
            return {}
        return {
            f"E{j}": torch.cat([t.e.reshape(-1, self.width) for t in terms]),
            f"B{j}": torch.cat([t.b for t in terms], 2).flatten(0, 1),
            f"A{j}": torch.cat([t.a for t in terms], 1).flatten(0, 1),
        }
