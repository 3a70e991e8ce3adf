"""The base classes of schemes."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tiedconv.core.expr import Add, Expr, MatMul, Ref, Shape
from tiedconv.core.plan import Block, Member
from tiedconv.errors import SchemeError
from tiedconv.numerics.kfac_metric import KfacMetric, mean_metric
from tiedconv.numerics.linalg import spectrum, truncate
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.schemes._align import fold_norms


@dataclass(frozen=True)
class Layout:
    """What a scheme stores for one group.

    Args:
        factors: factor name to shape.
        weights: one expression over the factors for each matrix, in order.
    """

    factors: Mapping[str, Shape]
    weights: tuple[Expr, ...]


@dataclass(frozen=True)
class RankOption:
    """A rank that a budget may choose.

    Args:
        params_per_rank: parameters of each further rank.
        min_rank: the smallest rank that still gives a matrix.
        break_even_rank: the rank above which two factors would be larger than their product.
        full_rank: the rank at which the product can be any matrix.
    """

    params_per_rank: int
    min_rank: int
    break_even_rank: int
    full_rank: int

    @classmethod
    def of(cls, shape: tuple[int, int], min_rank: int) -> RankOption:
        """The ranks that a product of this shape can have."""
        out, inputs = shape
        break_even = max(min_rank, out * inputs // (out + inputs))
        return cls(out + inputs, min_rank, break_even, min(out, inputs))


@dataclass(frozen=True)
class Draft:
    """A group before its ranks are final: its members and its scheme."""

    name: str
    scheme: Scheme
    members: tuple[Member, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes of the matrices that take part."""
        return [m.shape for m in self.members]


@dataclass(frozen=True)
class Scheme(ABC):
    """A parametrisation. Fields are its options; methods are pure tensor mathematics.

    Args:
        fold: before the fit, move LayerNorm scales into the weights that read them. Off, as it
            made data-free fits of lors and lowrank worse (docs/results.md).
    """

    name: ClassVar[str]
    pattern: ClassVar[str]
    min_rank: ClassVar[int] = 0  # the smallest that still gives a matrix
    # Options with which the scheme stores less, mildest first: suggested when a budget can't be
    # met.
    smaller_options: ClassVar[tuple[Mapping[str, Any], ...]] = ()
    # Whether two ranks of a group may be sides of one matrix, so that both together store less than
    # one after the other.
    has_shared_sides: ClassVar[bool] = False

    fold: bool = False

    @abstractmethod
    def drafts(self, blocks: Sequence[Block]) -> Iterator[Draft]:
        """The groups this scheme makes of a model's blocks."""

    @abstractmethod
    def layout(self, shapes: Sequence[tuple[int, int]]) -> Layout:
        """Factors and expressions for matrices of these shapes; needs no weights.

        Raises:
            SchemeError: an option doesn't fit these shapes.
        """

    @abstractmethod
    def fit(self, matrices: Sequence[Tensor]) -> dict[str, Tensor]:
        """The factors that come closest to the matrices: factor name to tensor."""

    def residuals(self, matrices: Sequence[Tensor]) -> Iterable[Tensor | None]:
        """For each matrix, what a residual of its rank approximates; None where it has no rank."""
        return [None] * len(matrices)

    def fit_measured(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> dict[str, Tensor]:
        """The factors to start from where it is known what errors cost; by default those of `fit`.

        Least squares improve them either way.
        """
        del metrics
        return self.fit(matrices)

    def measures(
        self, shapes: Sequence[tuple[int, int]], metrics: Sequence[KfacMetric]
    ) -> list[KfacMetric]:
        """What errors of each matrix cost, where its scheme knows more of it than the weight."""
        del shapes
        return list(metrics)

    def align(self, blocks: Sequence[Block], editor: WeightEditor) -> None:
        """Apply function-preserving symmetries, after which this scheme fits better."""
        if self.fold:
            fold_norms(blocks, editor)

    def arrange(
        self, blocks: Sequence[Block], editor: WeightEditor, metrics: Mapping[str, KfacMetric]
    ) -> Mapping[str, KfacMetric]:
        """Apply symmetries that are chosen by what errors cost, after these were measured.

        Args:
            blocks: that the scheme governs.
            editor: of the weights.
            metrics: by the names of the tensors; none without images.

        Returns:
            the metrics of the weights as they are then.
        """
        del blocks, editor
        return metrics

    @property
    def aligns(self) -> bool:
        """Whether `align` may change anything."""
        return self.fold or type(self).align is not Scheme.align

    @property
    def alignment(self) -> Hashable:
        """Equal for schemes whose `align` does the same; ranks make no difference to it.

        Conversions that try several schemes align and measure once for each. Two schemes that
        align alike but differ in this cost time, never correctness.
        """
        if type(self).align is Scheme.align:
            return ("fold", self.fold, "")
        ranks = ("rank", "k", "base_rank")
        return (self.name, *((k, v) for k, v in vars(self).items() if k not in ranks))

    def with_residual_ranks(self, ranks: Sequence[int]) -> Scheme:
        """The same scheme with one rank for each matrix."""
        del ranks
        return self

    def rank_slots(self, count: int) -> list[bool]:
        """Which of the matrices of a group have a rank."""
        return [False] * count

    def base_shape(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """Shape of the shared matrix that is itself stored as a product, None if there is none."""
        del shapes
        return None

    def base_gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> Tensor:  # fmt: skip
        """The cost that each further rank of the base removes, float64."""
        raise NotImplementedError

    def with_base_rank(self, rank: int) -> Scheme:
        """The same scheme with this rank of the base."""
        del rank
        return self

    def candidates(self) -> tuple[Scheme, ...]:
        """The schemes to choose from for each block, when there is a budget."""
        return (self,)

    def alternatives(self) -> tuple[Scheme, ...]:
        """Schemes to try besides this one when there is a budget; the best fit is taken."""
        return ()

    def rank_options(self, shapes: Sequence[tuple[int, int]]) -> list[RankOption | None]:
        """One for each matrix (None where it takes no rank), then one for the base."""
        takes = self.rank_slots(len(shapes))
        base = self.base_shape(shapes)
        return [
            *(
                RankOption.of(s, self.min_rank) if t else None
                for s, t in zip(shapes, takes, strict=True)
            ),
            RankOption.of(base, 1) if base else None,
        ]

    def gains(
        self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]
    ) -> list[Tensor | None]:  # fmt: skip
        """For each, the cost that each further rank removes, from rank 0 on, float64."""
        found: list[Tensor | None] = []
        if any(self.rank_slots(len(matrices))):
            for residual, metric in zip(self.residuals(matrices), metrics, strict=True):
                whitened = None if residual is None else spectrum(metric.whiten(residual))
                found.append(None if whitened is None else 0.5 * whitened.square())
        else:
            found += [None] * len(matrices)
        has_base = self.base_shape([(m.shape[0], m.shape[1]) for m in matrices]) is not None
        return [*found, self.base_gains(matrices, metrics) if has_base else None]

    def with_ranks(self, ranks: Sequence[int]) -> Scheme:
        """The same scheme with these ranks."""
        scheme = (
            self.with_residual_ranks(ranks[:-1]) if any(self.rank_slots(len(ranks) - 1)) else self
        )
        return scheme.with_base_rank(ranks[-1])

    def to_json(self) -> dict[str, Any]:
        """The options, as plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}


@dataclass(frozen=True)
class Ranked(Scheme):
    """A scheme with a rank for some of its matrices.

    Args:
        rank: a number, a fraction of a matrix's parameters (below 1), or one for each matrix.
        k: multipliers of `rank`, one for each matrix that takes a rank (LORS' K list).
    """

    rank: int | float | tuple[int, ...] = 0
    k: tuple[int, ...] = ()

    def with_residual_ranks(self, ranks: Sequence[int]) -> Scheme:
        return dataclasses.replace(self, rank=tuple(ranks), k=())

    def rank_slots(self, count: int) -> list[bool]:
        return [True] * count

    def ranks(self, shapes: Sequence[tuple[int, int]]) -> list[int]:
        """The rank of each matrix, 0 for those that take none."""
        return resolve_ranks(self.rank, self.k, shapes, self.rank_slots(len(shapes)))


@dataclass(frozen=True)
class FactoredBase(Scheme):
    """A scheme whose shared matrix (the base) may itself be stored as a product of two factors.

    Args:
        base_rank: rank of the shared matrix: a number, or a fraction of its parameters (below 1);
            0 stores it as it is. With a budget, both are tried.
    """

    base_name: ClassVar[str]

    base_rank: int | float = 0

    def with_base_rank(self, rank: int) -> Scheme:
        return dataclasses.replace(self, base_rank=rank) if self.base_rank else self

    def alternatives(self) -> tuple[Scheme, ...]:
        # A budget chooses the rank, whatever the start.
        return () if self.base_rank else (dataclasses.replace(self, base_rank=0.5),)

    def resolve_base_rank(self, shape: tuple[int, int]) -> int:
        """`base_rank` as a number, for a shared matrix of this shape."""
        if not self.base_rank:
            return 0
        return max(1, resolve_ranks(self.base_rank, (), [shape], [True], "base_rank")[0])

    def base_shape(self, shapes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        if not self.base_rank:
            return None
        plain = dataclasses.replace(self, base_rank=0).layout(shapes).factors[self.base_name]
        return plain[0], plain[1]

    def base_gains(self, matrices: Sequence[Tensor], metrics: Sequence[KfacMetric]) -> Tensor:
        # The shared matrix approximates all of them: their cost falls as its own spectrum does.
        plain = dataclasses.replace(self, base_rank=0)
        if any(self.rank_slots(len(matrices))):
            plain = plain.with_residual_ranks([0] * len(matrices))  # type: ignore[assignment]
        whole = plain.fit(matrices)[self.base_name]
        mean = mean_metric(metrics)
        values = spectrum(_whitened(mean, whole)).square()
        costs = sum(m.cost(w) for w, m in zip(matrices, metrics, strict=True))
        return values * (costs / float(values.sum().clamp(min=1e-300)))

    def store(self, factors: dict[str, Shape], shape: tuple[int, int]) -> Expr:
        """The shared matrix as an expression; adds what it stores."""
        rank = self.resolve_base_rank(shape)
        if not rank:
            factors[self.base_name] = shape
            return Ref(self.base_name, shape)
        left, right = (f"{self.base_name}_{part}" for part in ("left", "right"))
        return with_product(factors, left, right, rank, shape)

    def stored(self, whole: Tensor) -> dict[str, Tensor]:
        """The tensors that `store` declared, from the shared matrix."""
        rank = self.resolve_base_rank((whole.shape[0], whole.shape[1]))
        if not rank:
            return {self.base_name: whole}
        b, a = truncate(whole, rank)
        return {f"{self.base_name}_left": b, f"{self.base_name}_right": a}


def _whitened(metric: KfacMetric, matrix: Tensor) -> Tensor:
    """The matrix whitened by those sides of a metric that fit its size."""
    rows, columns = matrix.shape
    left = metric.left if metric.left is not None and len(metric.left) == rows else None
    right = metric.right if metric.right is not None and len(metric.right) == columns else None
    return KfacMetric(left, right).whiten(matrix)


def resolve_ranks(
    rank: int | float | tuple[int, ...],
    k: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    takes: Sequence[bool],
    name: str = "rank",
) -> list[int]:
    """One rank for each matrix, from any of the ways in which ranks are given.

    Args:
        rank: a number; a fraction of a matrix's parameters (below 1); or one for each matrix.
        k: the paper's K list, one multiplier of `rank` for each matrix that takes a rank, or
            empty.
        shapes: of the matrices.
        takes: which of them take a rank; the others get 0.
        name: of the option, for its errors.
    """
    count = sum(takes)
    if isinstance(rank, float) and not math.isfinite(rank):
        raise SchemeError(
            f"Invalid {name}={rank}", hint="Use a finite number, 0 or more", code="invalid-rank"
        )
    if isinstance(rank, float) and rank >= 1:
        raise SchemeError(
            f"Invalid {name}={rank}",
            hint="Use a whole number, or a fraction below 1",
            code="invalid-rank",
        )
    if isinstance(rank, tuple) and len(rank) != len(shapes):
        raise SchemeError(
            f"rank lists {len(rank)} ranks, but a group has {len(shapes)} matrices",
            hint="Give one rank for each matrix, or one number for all",
            code="wrong-rank-count",
        )
    if k and len(k) != count:
        raise SchemeError(
            f"k lists {len(k)} multipliers, but a group has {count} layers",
            hint="Give one multiplier for each layer, or limit the rule with include",
            code="wrong-rank-count",
        )
    multipliers = iter(k or [1] * count)
    ranks: list[int] = []
    for i, ((out, inputs), taking) in enumerate(zip(shapes, takes, strict=True)):
        if not taking:
            ranks.append(0)
            continue
        if isinstance(rank, tuple):
            value = float(rank[i])
        else:
            value = rank * next(multipliers)
            if isinstance(rank, float):
                value = math.floor(value * out * inputs / (out + inputs))
        if value < 0:
            raise SchemeError(
                f"{name}={rank} is negative", hint="Use 0 or more", code="invalid-rank"
            )
        ranks.append(min(int(value), out, inputs))
    return ranks


def with_residual(
    factors: dict[str, Shape], base: Expr | None, j: int, rank: int, shape: tuple[int, int]
) -> Expr:
    """`base + B_j A_j`; adds the factors `B<j>` and `A<j>`."""
    if rank == 0:
        assert base is not None
        return base
    product = with_product(factors, f"B{j}", f"A{j}", rank, shape)
    return product if base is None else Add(base, product)


def with_product(
    factors: dict[str, Shape], b: str, a: str, rank: int, shape: tuple[int, int]
) -> Expr:
    """A product of a given rank; adds its two factors."""
    left, right = Ref(b, (shape[0], rank)), Ref(a, (rank, shape[1]))
    factors |= {left.name: left.of, right.name: right.of}
    return MatMul(left, right)
