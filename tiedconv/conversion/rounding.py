"""Precision: the stored tensors of a fit as integers, as coarse as a budget of bytes asks for.

One step is chosen for the whole model. Each matrix has the metric of its errors, all in one unit,
so the same step gives every matrix the number of bits at which one more bit removes as much cost
per byte as anywhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tiedconv.core.expr import Expr, Ref
from tiedconv.core.packed_codes import WIDTHS, packed
from tiedconv.core.plan import Group, Plan
from tiedconv.core.storage import CODES, COLUMNS, SCALES, IntFormat, prefix_of, quantized
from tiedconv.core.units import is_depthwise
from tiedconv.errors import BudgetError
from tiedconv.io.narrowing import halved
from tiedconv.numerics.factor_metric import factor_metric
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric
from tiedconv.numerics.least_squares import refit
from tiedconv.numerics.rounding import (
    Rounded,
    Rounding,
    RoundingSample,
    cost_of_step,
    entropy,
    half_exact,
    width_of,
)
from tiedconv.planning.drafting import KEPT
from tiedconv.planning.rank_allocation import KfacMetrics, metrics_of
from tiedconv.schemes import make_scheme

ANY_WIDTH = (WIDTHS[0], WIDTHS[-1])
MOST_BITS = WIDTHS[-1]
"""Depthwise kernels get them: they are few, and one channel may carry much of the answer."""

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

SizeOf = Callable[[Plan, Mapping[str, Tensor]], int]
"""The bytes of the file of a plan and its tensors."""


@dataclass(frozen=True)
class RoundedModel:
    """What `round_to_bytes` found.

    Args:
        plan: with packed integers.
        tensors: its stored tensors.
        cost: that rounding adds to that of the fit.
        step: that was chosen.
        bytes: of the file.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    cost: float
    step: float
    bytes: int


def round_to_bytes(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    metrics: KfacMetrics,
    budget: int,
    size_of: SizeOf,
    widths: tuple[int, int] = ANY_WIDTH,
) -> RoundedModel:
    """The stored tensors as integers, such that the file has at most so many bytes.

    Args:
        plan: that stores floats.
        tensors: that it stores.
        metrics: of each weight, by its tensor's name.
        budget: bytes of the file.
        size_of: measures a file.
        widths: of the integers, the fewest and the most bits.

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
    cost = bits = count = 0.0
    for group in plan.groups:
        cost += _round_group(group, floats, found, metrics, step, widths)
    rest = [part for part in _kept_matrices(plan, floats, metrics) if part[0] not in found]
    for name, matrix, metric in rest:
        if metric is not None:
            rounding = Rounding(matrix, metric)
            found[name] = rounding.at(step, 2 ** (widths[1] - 1) - 1)
            cost += rounding.cost(found[name])
    for rounded in found.values():
        bits += rounded.values.numel() * entropy(rounded.values)
        count += rounded.values.numel()
    average = bits / max(1.0, count)
    for name, matrix, metric in rest:
        if metric is None:
            depthwise = _is_depthwise(floats[name])
            bits = MOST_BITS if depthwise else max(4, math.ceil(average) + UNMEASURED_BITS)
            found[name] = _table(matrix, min(widths[1], bits))
    return _assembled(plan, floats, found, cost, step, widths)


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
    for factor in apart:
        if _is_worth(factors[factor]):
            found[names[factor]] = _table(factors[factor], min(widths[1], MOST_BITS))
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


def _table(matrix: Tensor, bits: int) -> Rounded:
    """A matrix without a metric, with a scale a row: an embedding, or depthwise kernels."""
    largest = 2 ** (bits - 1) - 1
    rows = (matrix.double().abs().amax(1, keepdim=True) / largest).clamp(min=1e-30)
    rows = half_exact(rows)
    values = (matrix.double() / rows).round().clamp(-largest - 1, largest)
    return Rounded(values.to(torch.int8), rows.float(), None)


def _assembled(
    plan: Plan,
    floats: Mapping[str, Tensor],
    found: Mapping[str, Rounded],
    cost: float,
    step: float,
    widths: tuple[int, int],
) -> RoundedModel:
    formats: dict[str, IntFormat] = {}
    tensors = {name: halved(t) for name, t in floats.items() if name not in found}
    for name, rounded in found.items():
        bits, prefix = width_of(rounded.values, *widths), prefix_of(name, plan)
        rows = floats[name].shape[0]
        groups = len(rounded.rows) // rows  # of a table, the rows of all its matrices
        columns = rounded.values.numel() // rows
        group = rounded.values.shape[1] if groups > 1 else 0
        formats[name] = IntFormat(bits, group, rounded.columns is not None)
        tensors[f"{prefix}/{CODES}"] = packed(rounded.values, bits)
        tensors[f"{prefix}/{SCALES}"] = rounded.rows.reshape(rows, groups)
        if rounded.columns is not None:
            tensors[f"{prefix}/{COLUMNS}"] = rounded.columns.reshape(1, columns)
    return RoundedModel(quantized(plan, formats), tensors, cost, step, 0)
