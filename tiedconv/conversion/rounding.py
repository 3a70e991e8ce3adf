"""Precision: the stored tensors of a fit as integers, as coarse as a budget of bytes asks for.

One step is chosen for the whole model. Each matrix has the metric of its errors, all in one unit,
so the same step gives every matrix the number of bits at which one more bit removes as much cost
per byte as anywhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from tiedconv.conversion.rounded_model import RoundedModel, SizeOf, assembled
from tiedconv.conversion.spare_bytes import with_floats
from tiedconv.core.expr import Expr, Ref
from tiedconv.core.packed_codes import WIDTHS
from tiedconv.core.plan import Group, Plan
from tiedconv.core.units import is_depthwise
from tiedconv.errors import BudgetError
from tiedconv.numerics.factor_metric import factor_metric
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.least_squares import refit
from tiedconv.numerics.rounding import (
    Rounded,
    Rounding,
    RoundingSample,
    alike_inputs,
    cost_of_step,
    entropy,
    in_bits,
)
from tiedconv.planning.drafting import KEPT
from tiedconv.planning.rank_allocation import KfacMetrics, metrics_of
from tiedconv.schemes import make_scheme

ANY_WIDTH = (WIDTHS[0], WIDTHS[-1])
DEPTHWISE_BITS = 3
"""Bits that depthwise kernels get above the average, 8 at most: they are few, and one channel may
carry much of the answer."""

LEAST = 64
"""Values of a tensor that is worth integers and their scales."""

TRIES = 5
"""Roundings until the budget is met."""

CLOSE = 0.985
"""Of the budget: a file that takes as much of it is not made larger."""

TRUSTED = 0.6
"""Of the cost by the step, what rounding costs in the metric itself, which the step trusts less."""

UNMEASURED_BITS = 2
"""Bits that a table without a metric, such as an embedding, gets above the average."""


def round_to_bytes(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    metrics: KfacMetrics,
    budget: int,
    size_of: SizeOf,
    widths: tuple[int, int] = ANY_WIDTH,
    *,
    floats: bool = False,
) -> RoundedModel:
    """The stored tensors as integers, such that the file has at most so many bytes.

    Args:
        plan: that stores floats.
        tensors: that it stores.
        metrics: of each weight, by its tensor's name.
        budget: bytes of the file.
        size_of: measures a file.
        widths: of the integers, the fewest and the most bits.
        floats: whether some may stay floats where the widest integers leave bytes.

    Raises:
        BudgetError: the least file is larger (`budget-too-small`).
    """
    forecast = Forecast(plan, tensors, metrics)
    wanted, best = 8.0 * budget, None
    smallest = math.inf
    for _ in range(TRIES):
        step = forecast.step_for(wanted)
        found = round_at(plan, tensors, metrics, step, widths)
        size = size_of(found.plan, found.tensors)
        smallest = min(smallest, size)
        found = dataclasses.replace(found, bytes=size)
        if size <= budget and (best is None or size > best.bytes):
            best = found
        if CLOSE * budget <= size <= budget or (size <= budget and step <= 2 * _FINEST):
            break
        # As many bits more or fewer as are missing, by the forecast, and a little to be safe.
        wanted = forecast.bits(step) + 8 * (0.995 * budget - size)
        if wanted <= forecast.bits(_COARSEST):
            wanted = forecast.bits(_COARSEST)
            if step >= _COARSEST:
                break
    if best is None:
        raise BudgetError(
            f"{budget:,} bytes were asked for, and the file has at least {int(smallest):,}",
            "Nothing was written",
            "Ask for more bytes, or for fewer parameters besides, with --params",
            code="budget-too-small",
            smallest=int(smallest),
        )
    if floats and best.bytes < CLOSE * budget:
        return with_floats(best, plan, tensors, budget, size_of, widths)
    return best


_FINEST, _COARSEST = 2.0**-24, 2.0**4


class Forecast:
    """How many bits a plan takes at each step, without rounding it.

    Args:
        plan, tensors, metrics: see `round_to_bytes`.
    """

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], metrics: KfacMetrics) -> None:
        self._samples: list[RoundingSample] = []
        self._tables = scales = 0
        for _, matrix, metric in _matrices(plan, tensors, metrics):
            if metric is None:
                self._tables += matrix.numel()
            else:
                self._samples.append(Rounding(matrix, metric).sample())
                scales += len(matrix)
        self.count = sum(sample.count for sample in self._samples)
        """Numbers that become integers at the step."""
        numbers = sum(math.prod(s) for s in plan.tensors.values())
        self._floats = numbers - self.count - self._tables + scales
        self._known: dict[int, float] = {}

    def bits(self, step: float) -> float:
        """Bits in all, at a step; between powers of two by interpolation."""
        place = math.log2(step)
        low = math.floor(place)
        share = place - low
        return (1 - share) * self._bits_at(low) + share * self._bits_at(low + 1)

    def _bits_at(self, power: int) -> float:
        if power not in self._known:
            step = 2.0**power
            found = sum(sample.bits(step) for sample in self._samples)
            self._known[power] = found + 16 * self._floats + 6 * self._tables
        return self._known[power]

    def cost(self, step: float) -> float:
        """What rounding at a step costs, about."""
        return TRUSTED * cost_of_step(step, self.count)

    def step_for(self, bits: float) -> float:
        """The finest step at which no more bits are taken."""
        low, high = math.log2(_FINEST), math.log2(_COARSEST)
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.bits(2**middle) > bits else (low, middle)
        return float(2**high)


def round_at(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    metrics: KfacMetrics,
    step: float,
    widths: tuple[int, int] = ANY_WIDTH,
) -> RoundedModel:
    """The stored tensors as integers at a step; the factors of a group after one another.

    After one factor is rounded, those that are still floats are fitted to what it left.
    """
    found: dict[str, Rounded] = {}
    floats = {name: t.detach().clone() for name, t in tensors.items()}
    costs: dict[tuple[str, ...], float] = {}
    bits = count = 0.0
    for group in plan.groups:
        before = {*found}
        cost = _round_group(group, floats, found, metrics, step, widths)
        if names := tuple(name for name in found if name not in before):
            costs[names] = cost
    rest = [part for part in _kept_matrices(plan, floats, metrics) if part[0] not in found]
    for name, matrix, metric in rest:
        if metric is not None:
            rounding = Rounding(matrix, metric)
            found[name] = rounding.at(step, 2 ** (widths[1] - 1) - 1)
            costs[name,] = rounding.cost(found[name])
    for rounded in found.values():
        bits += rounded.values.numel() * entropy(rounded.values)
        count += rounded.values.numel()
    average = math.ceil(bits / max(1.0, count))
    for name, matrix, metric in rest:
        if metric is None and not _is_depthwise(floats[name]):
            found[name] = in_bits(matrix, min(widths[1], max(4, average + UNMEASURED_BITS)))
            costs[name,] = math.inf
    for name in _depthwise_names(plan, floats):
        fine = min(widths[1], average + DEPTHWISE_BITS)
        found[name] = _depthwise(floats[name], metrics.get(name), fine)
        costs[name,] = math.inf
    made, stored = assembled(plan, floats, found, widths)
    cost = sum(each for each in costs.values() if math.isfinite(each))
    return RoundedModel(made, stored, cost, step, 0, found, floats, costs)


def _round_group(
    group: Group,
    floats: dict[str, Tensor],
    found: dict[str, Rounded],
    metrics: KfacMetrics,
    step: float,
    widths: tuple[int, int],
) -> float:
    """Round a group's matrices, into `found`; its cost beyond that of its fit."""
    names = {factor: group.stored_name(factor) for factor in group.factors}
    factors = {factor: floats[name] for factor, name in names.items()}
    weights, measures = _expressions(group), metrics_of(group.members, metrics)
    targets = [expr.evaluate(factors.__getitem__) for expr in weights]
    apart = _depthwise_factors(group)
    worth = [f for f, t in factors.items() if _is_worth(t) and f not in apart]
    left = sorted(worth, key=lambda f: (-factors[f].numel(), f))
    for i, factor in enumerate(left):
        metric = factor_metric(factor, weights, factors, measures)
        rounded = Rounding(factors[factor], metric).at(step, 2 ** (widths[1] - 1) - 1)
        found[names[factor]] = rounded
        factors[factor] = rounded.matrix.to(factors[factor].dtype)
        free = [f for f in factors if f not in left[: i + 1] and f not in apart]
        if free:
            factors = refit(weights, factors, targets, measures, free)
    for factor in factors:
        floats[names[factor]] = factors[factor]
    return sum(
        m.cost(t - e.evaluate(factors.__getitem__))
        for e, t, m in zip(weights, targets, measures, strict=True)
    )


def _expressions(group: Group) -> tuple[Expr, ...]:
    if group.scheme == KEPT:
        ((factor, shape),) = group.factors.items()
        return (Ref(factor, shape),)
    scheme = make_scheme(group.scheme, group.options)
    return tuple(scheme.layout([m.shape for m in group.members]).weights)


def _matrices(
    plan: Plan, tensors: Mapping[str, Tensor], metrics: KfacMetrics
) -> Iterator[tuple[str, Tensor, KfacMetric | None]]:
    """What becomes integers: stored name, matrix, metric (None where errors were not measured)."""
    for group in plan.groups:
        factors = {f: tensors[group.stored_name(f)] for f in group.factors}
        weights, measures = _expressions(group), metrics_of(group.members, metrics)
        apart = _depthwise_factors(group)
        for factor, tensor in factors.items():
            if _is_worth(tensor):
                known = factor not in apart
                metric = factor_metric(factor, weights, factors, measures) if known else None
                yield group.stored_name(factor), tensor, metric
    yield from _kept_matrices(plan, tensors, metrics)


def _kept_matrices(
    plan: Plan, tensors: Mapping[str, Tensor], metrics: KfacMetrics
) -> Iterator[tuple[str, Tensor, KfacMetric | None]]:
    for name in plan.kept:
        tensor = tensors[name]
        if name in plan.buffers or not _is_worth(tensor):
            continue
        matrix = tensor.reshape(len(tensor), -1)
        metric = metrics.get(name)
        if _is_depthwise(tensor):
            yield name, matrix, None
        elif metric is not None and _fits(metric, matrix):
            yield name, matrix, metric
        elif metrics:
            yield name, tensor.reshape(-1, tensor.shape[-1]), None
        else:
            yield name, matrix, IDENTITY


def _fits(metric: KfacMetric, matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    return (metric.left is None or len(metric.left) == rows) and (
        metric.right is None or len(metric.right) == columns
    )


def _is_depthwise(tensor: Tensor) -> bool:
    """Whether each output reads one input: the moments of all inputs together say little of it."""
    return tensor.ndim == 4 and tensor.shape[1] == 1


def _depthwise_factors(group: Group) -> list[str]:
    """The factors of a group that hold depthwise kernels, a row each, whose errors are unknown."""
    if group.scheme == KEPT:
        return []
    pairs = zip(group.members, _expressions(group), strict=True)
    return [ref for member, expr in pairs if is_depthwise(member.slot) for ref in expr.refs]


def _is_worth(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of some size; vectors stay floats."""
    matrix = tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() > max(tensor.shape)
    return matrix and tensor.numel() >= LEAST


def _depthwise_names(plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
    """The stored tensors that hold depthwise kernels."""
    found = [g.stored_name(factor) for g in plan.groups for factor in _depthwise_factors(g)]
    kept = [name for name in plan.kept if name not in plan.buffers and _is_depthwise(tensors[name])]
    return [name for name in found + kept if _is_worth(tensors[name])]


def _depthwise(matrix: Tensor, metric: KfacMetric | None, bits: int) -> Rounded:
    """Depthwise kernels, a row each.

    The moments of all inputs together do not tell which channel matters, but they tell how alike
    the positions of one are, which is what errors of a kernel can make good.
    """
    flat = matrix.reshape(len(matrix), -1)
    columns = flat.shape[1]
    moment = None if metric is None else metric.right
    if moment is None or len(moment) != columns or not moment.diagonal().sum() > 0:
        moment = alike_inputs(columns)
    return in_bits(flat, bits, moment)
