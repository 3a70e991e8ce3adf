"""What errors of one factor cost, where a weight is an expression of several.

An expression is linear in each of its factors, so an error E of a factor moves the weight by a
linear map of E. For `B A` with a metric (G, C) of the product, A has the metric `(B^T G B, C)` and
B has `(G, A C A^T)`. A factor that is read several times has the sum: one metric stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.expr import Add, Cat, Expr, Lookup, MatMul, Mul, Permute, Ref, Slice
from tiedconv.core.pad import Pad
from tiedconv.numerics.kfac_metric import IDENTITY, KfacMetric, mean_metric

Sides = tuple[Tensor | None, Tensor | None]
"""The second moments of a matrix's rows and columns; None stands for the identity."""


def factor_metric(
    name: str,
    weights: Sequence[Expr],
    factors: Mapping[str, Tensor],
    metrics: Sequence[KfacMetric],
) -> KfacMetric:
    """The metric of a factor.

    Args:
        name: of the factor.
        weights: one expression for each matrix.
        factors: name to tensor.
        metrics: of each matrix.
    """
    lookup = factors.__getitem__
    rows, columns = factors[name].shape
    found = []
    for expr, metric in zip(weights, metrics, strict=True):
        for left, right in _sides(expr, name, (metric.left, metric.right), lookup):
            fits = (left is None or len(left) == rows) and (right is None or len(right) == columns)
            found.append(KfacMetric(left, right) if fits else IDENTITY)
    return mean_metric(found) if found else IDENTITY


def _sides(expr: Expr, name: str, sides: Sides, lookup: Lookup) -> list[Sides]:
    """For each place where an expression reads the factor, the moments of its two dimensions."""
    if name not in expr.refs:
        return []
    left, right = sides
    match expr:
        case Ref():
            return [sides]
        case Permute(x=x, dims=(1, 0)):
            return _sides(x, name, (right, left), lookup)
        case Add(a=a, b=b) if a.shape == b.shape:
            return _sides(a, name, sides, lookup) + _sides(b, name, sides, lookup)
        case MatMul(a=a, b=b) if len(expr.shape) == 2:
            found = []
            if name in a.refs:
                found += _sides(a, name, (left, _through(b.evaluate(lookup), right)), lookup)
            if name in b.refs:
                found += _sides(b, name, (_through(a.evaluate(lookup).t(), left), right), lookup)
            return found
        case Mul(a=a, b=b) if a.shape == expr.shape and name in a.refs and len(expr.shape) == 2:
            scale = b.evaluate(lookup)
            if b.shape == (expr.shape[0], 1):
                return _sides(a, name, (_scaled(left, scale.reshape(-1)), right), lookup)
            return _sides(a, name, (left, _scaled(right, scale.reshape(-1))), lookup)
        case Slice(x=x, dim=dim, start=start) if len(x.shape) == 2:
            whole = _embedded(sides[dim], start, expr.shape[dim], x.shape[dim])
            return _sides(x, name, (whole, right) if dim == 0 else (left, whole), lookup)
        case Pad(x=x, dim=dim) if len(expr.shape) == 2:
            moment, kept = sides[dim], x.shape[dim]
            own = None if moment is None else moment[:kept, :kept]
            return _sides(x, name, (own, right) if dim == 0 else (left, own), lookup)
        case Cat(xs=parts, dim=dim) if len(expr.shape) == 2:
            found, start = [], 0
            for part in parts:
                stop = start + part.shape[dim]
                moment = sides[dim]
                own = None if moment is None else moment[start:stop, start:stop]
                found += _sides(part, name, (own, right) if dim == 0 else (left, own), lookup)
                start = stop
            return found
    return [(None, None)]


def _through(matrix: Tensor, moment: Tensor | None) -> Tensor:
    """`M S M^T`: the moment of features S after a map M."""
    matrix = matrix.detach().double()
    return matrix @ matrix.t() if moment is None else matrix @ moment.double() @ matrix.t()


def _scaled(moment: Tensor | None, scale: Tensor) -> Tensor:
    """The moment of features that are scaled."""
    scale = scale.detach().double()
    if moment is None:
        return torch.diag(scale.square())
    return moment.double() * scale.unsqueeze(1) * scale


def _embedded(moment: Tensor | None, start: int, size: int, whole: int) -> Tensor:
    """The moment of all entries, where only some of them are read."""
    found = torch.zeros(whole, whole, dtype=torch.float64)
    found[start : start + size, start : start + size] = (
        torch.eye(size, dtype=torch.float64) if moment is None else moment.double()
    )
    return found
