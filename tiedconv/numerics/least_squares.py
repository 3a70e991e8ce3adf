"""Least squares over expressions: better factors for any scheme, from its layout alone.

The cost of a group is a sum over its matrices of `metric.cost(M - expression)`. Every expression is
linear in each of its factors, so with the others held fixed the cost is quadratic in one. The
factors are improved by turns: a product `B A` of one matrix alone exactly (truncated SVD in the
metric), any other factor by a few steps of preconditioned conjugate gradients. No step raises the
cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from tiedconv.core.expr import Add, Cat, Expr, MatMul, Mul, Permute, Ref, Reshape, Slice
from tiedconv.core.pad import Pad
from tiedconv.numerics.kfac_metric import KfacMetric, mean_metric
from tiedconv.numerics.linalg import cholesky

SWEEPS = 3
STEPS = 8

Factors = dict[str, Tensor]


def total_cost(
    weights: Sequence[Expr], factors: Mapping[str, Tensor], matrices: Sequence[Tensor],
    metrics: Sequence[KfacMetric],
) -> float:  # fmt: skip
    """The cost of a group, see `KfacMetric`."""
    return sum(
        metric.cost(matrix - expr.evaluate(factors.__getitem__))
        for expr, matrix, metric in zip(weights, matrices, metrics, strict=True)
    )


def improve(
    weights: Sequence[Expr],
    factors: Mapping[str, Tensor],
    matrices: Sequence[Tensor],
    metrics: Sequence[KfacMetric],
    *,
    sweeps: int = SWEEPS,
    steps: int = STEPS,
) -> Factors:
    """Factors with a lower cost, from a start.

    Args:
        weights: one expression for each matrix.
        factors: the start: name to tensor.
        matrices: what the expressions approximate, `(out, in)`.
        metrics: one for each.
        sweeps: turns over all factors at most; it stops when one gains less than 1 part in 1,000.
        steps: of conjugate gradients for each factor and turn.
    """
    found: Factors = dict(factors)
    pairs = _unshared_pairs(weights)
    in_pairs = {name for b, a, _ in pairs for name in (b, a)}
    others = [name for name in found if name not in in_pairs]
    cost = total_cost(weights, found, matrices, metrics)
    # A single pair is exact after one turn.
    for _ in range(sweeps if others or len(pairs) > len(weights) else 1):
        start = dict(found)
        for b, a, j in pairs:
            _fit_pair(found, b, a, weights[j], matrices[j], metrics[j])
        for name in others:
            _descend(found, name, weights, matrices, metrics, steps)
        before, cost = cost, total_cost(weights, found, matrices, metrics)
        if not cost <= before:  # rounding, where a metric is nearly singular
            return start
        if before - cost <= 1e-3 * before:
            break
    return found


def refit(
    weights: Sequence[Expr],
    factors: Mapping[str, Tensor],
    matrices: Sequence[Tensor],
    metrics: Sequence[KfacMetric],
    names: Sequence[str],
    *,
    steps: int = STEPS,
) -> Factors:
    """Factors with a lower cost, of which only some may change.

    Args:
        weights, factors, matrices, metrics, steps: see `improve`.
        names: of those that may.
    """
    found = dict(factors)
    cost = total_cost(weights, found, matrices, metrics)
    for name in names:
        before = found[name]
        _descend(found, name, weights, matrices, metrics, steps)
        after = total_cost(weights, found, matrices, metrics)
        if after <= cost:
            cost = after
        else:  # rounding, where a metric is nearly singular
            found[name] = before
    return found


def _unshared_pairs(weights: Sequence[Expr]) -> list[tuple[str, str, int]]:
    """Products B A that are a term of one matrix and are read nowhere else: B, A, its place."""
    uses = Counter(node.name for e in weights for node in e.walk() if isinstance(node, Ref))
    pairs = []
    for j, expr in enumerate(weights):
        for term in _terms(expr):
            match term:
                case MatMul(a=Ref(name=b), b=Ref(name=a)) if uses[b] == uses[a] == 1:
                    pairs.append((b, a, j))
    return pairs


def _terms(expr: Expr) -> list[Expr]:
    return [t for c in expr.children for t in _terms(c)] if isinstance(expr, Add) else [expr]


def _fit_pair(
    factors: Factors, b: str, a: str, expr: Expr, matrix: Tensor, metric: KfacMetric
) -> None:  # fmt: skip
    old = factors[b], factors[a]
    factors[b] = torch.zeros_like(old[0])
    target = matrix - expr.evaluate(factors.__getitem__)
    new = metric.truncate(target, old[0].shape[1])
    # An exact step may raise the cost by rounding where nothing is left to gain.
    better = metric.cost(target - new[0] @ new[1]) <= metric.cost(target - old[0] @ old[1])
    factors[b], factors[a] = new if better else old


def _descend(
    factors: Factors,
    name: str,
    weights: Sequence[Expr],
    matrices: Sequence[Tensor],
    metrics: Sequence[KfacMetric],
    steps: int,
) -> None:
    """Preconditioned conjugate gradients on one factor, in place in `factors`."""
    mine = [j for j, e in enumerate(weights) if name in e.refs]
    start = factors[name]

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            found = {**factors, name: at}
            made = [weights[j].evaluate(found.__getitem__) for j in mine]
        cotangents = [
            metrics[j].apply(m.detach() - matrices[j]) for j, m in zip(mine, made, strict=True)
        ]
        (result,) = torch.autograd.grad(made, at, cotangents)
        return result

    factors[name] = conjugate_gradients(
        gradient, start, _preconditioner(name, start, [(weights[j], metrics[j]) for j in mine]),
        steps,
    )  # fmt: skip


def conjugate_gradients(
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """The minimiser of a quadratic function, from its gradient alone.

    Args:
        gradient: of the function; differences of it are the products with the Hessian.
        x: the start.
        precondition: a positive definite map near the Hessian's inverse.
        steps: at most.
    """
    g0 = gradient(x)
    residual = -g0
    z = precondition(residual)
    p, rz = z, (residual * z).sum()
    least = 1e-6 * float(rz)
    x0, size = x, float(x.norm()) or 1.0
    for _ in range(steps):
        length = float(p.norm())
        if not float(rz) > max(least, 0.0) or not length:
            break
        step = size / length  # a step as long as x itself, so that rounding matters little
        hp = (gradient(x0 + step * p) - g0) / step
        curvature = float((p * hp).sum())
        if not curvature > 0:
            break
        alpha = float(rz) / curvature
        x, residual = x + alpha * p, residual - alpha * hp
        z = precondition(residual)
        before, rz = rz, (residual * z).sum()
        p = z + (rz / before) * p
    return x


def _preconditioner(
    name: str, factor: Tensor, uses: Sequence[tuple[Expr, KfacMetric]]
) -> Callable[[Tensor], Tensor]:
    """Solves with the moments of a factor's rows and columns in the cost."""
    if factor.ndim != 2:
        return lambda r: r
    sides: list[KfacMetric] = []
    for expr, metric in uses:
        for left, right in _other_terms(expr, name, metric.left, metric.right):
            rows, columns = factor.shape
            left = left if left is not None and left.shape[0] == rows else None
            right = right if right is not None and right.shape[0] == columns else None
            sides.append(KfacMetric(left, right))
    mean = mean_metric(sides)
    left, right = _cholesky(mean.left, factor), _cholesky(mean.right, factor)

    def solve(r: Tensor) -> Tensor:
        if left is not None:
            r = torch.cholesky_solve(r, left)
        return r if right is None else torch.cholesky_solve(r.t(), right).t()

    return solve


def _other_terms(
    expr: Expr, name: str, left: Tensor | None, right: Tensor | None
) -> list[tuple[Tensor | None, Tensor | None]]:
    """For each place where an expression reads a factor, the moments of its two dimensions."""
    match expr:
        case Ref():
            return [(left, right)] if expr.name == name else []
        case MatMul(a=x, b=y):
            return _other_terms(x, name, left, None) + _other_terms(y, name, None, right)
        case Permute(x=x, dims=(1, 0)):
            return _other_terms(x, name, right, left)
        case Pad(x=x, dim=dim) if len(expr.shape) == 2:
            kept = x.shape[dim]
            own = (left, right)[dim]
            own = None if own is None else own[:kept, :kept]
            return _other_terms(x, name, *((own, right) if dim == 0 else (left, own)))
        case Slice() | Cat() | Reshape():  # another size: no moment fits
            return [part for c in expr.children for part in _other_terms(c, name, left, right)]
        case Add() | Mul():
            return [part for c in expr.children for part in _other_terms(c, name, left, right)]
    return [(None, None)] if name in expr.refs else []


def _cholesky(moment: Tensor | None, like: Tensor) -> Tensor | None:
    return None if moment is None else cholesky(moment).to(like.dtype)
