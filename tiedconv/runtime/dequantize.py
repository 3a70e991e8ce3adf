"""A tied model whose integers are floats again, and the integers beside it.

Formats with a graph are written from floats; those that have integers of their own store these in
place of the floats.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Dequantize, Expr, Mul, Ref, Shape, reshape
from tiedconv.core.packed_codes import unpacked
from tiedconv.core.plan import PREFIX, Plan
from tiedconv.core.storage import CODES
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of, tie, untie


@dataclass(frozen=True)
class Integers:
    """A matrix, kernel or table `values * scales * columns`.

    Args:
        values: int8, of the shape of the tensor.
        scales: one for each row, float32.
        columns: a factor for each entry of a row, `(1, ...)`; None without.
        bits: 4 where all values fit, else 8.
        axis: the dimension of rows: 1 for a table `(1, rows, columns)`, as of positions, else 0.
    """

    values: Tensor
    scales: Tensor
    columns: Tensor | None
    bits: int
    axis: int = 0


def dequantize(model: nn.Module) -> nn.Module:
    """The model with each quantised matrix as one float tensor, in place; returns it.

    Ties stay. Weights that share nothing are plain parameters again.

    Raises:
        UserError: the model is not tied.
    """
    return dequantized(model)[0]


@torch.no_grad()
def dequantized(model: nn.Module) -> tuple[nn.Module, dict[str, Integers]]:
    """As `dequantize`; and the integers, under the names of the float tensors.

    Matrices with scales that no dimension has are floats alone.
    """
    state = state_of(model)
    if not state.plan.codes:
        return model, {}
    own = {name: t.detach() for name, t in state_tensors(model).items()}
    matrices: dict[str, Tensor] = {}
    products: dict[str, Expr] = {}

    def floats(expr: Expr) -> Expr:
        match expr:
            case Mul(a=Dequantize() as inner) | (Dequantize() as inner):
                (codes, *_) = inner.codes.refs
                name = codes.removesuffix(f"/{CODES}")
                matrices[name], products[name] = expr.evaluate(own.__getitem__), expr
                return Ref(name, expr.shape)
        return expr.map_children(floats)

    weights = {name: floats(expr) for name, expr in state.plan.weights.items()}
    alone = {name for name, expr in weights.items() if _is_alone(expr, weights)}
    shapes = {next(iter(weights[name].refs)): (name, weights[name].shape) for name in alone}
    integers: dict[str, Integers] = {}
    for name, product in products.items():
        weight, shape = shapes.get(name, (name, product.shape))
        if (given := _integers(product, own, shape)) is not None:
            integers[weight] = given
    kept = {**state.plan.kept, **{name: weights[name].shape for name in alone}}
    plan = Plan(
        {name: expr for name, expr in weights.items() if name not in alone},
        state.plan.groups,
        dict(sorted(kept.items())),
        state.plan.buffers,
        state.plan.aliases,
    )
    modes = {module: module.training for module in model.modules()}
    untie(model)
    if plan.weights:
        found = {n: matrices.get(n, own.get(n)) for n in plan.factors}
        factors = {n: t.clone() for n, t in found.items() if t is not None}
        tie(model, plan, factors, source=state.source, history=state.history)
    else:
        tie(model, dataclasses.replace(plan, groups=()), {}, source=state.source,
            history=state.history)  # fmt: skip
    for module, mode in modes.items():
        module.training = mode
    return model, integers


def _integers(product: Expr, own: dict[str, Tensor], shape: Shape) -> Integers | None:
    """The integers of a product, None if they have scales that no dimension has."""
    node = product.a if isinstance(product, Mul) else product
    assert isinstance(node, Dequantize)
    rows, groups = node.scales.shape
    is_table = groups > 1 and rows == 1 and len(shape) > 2 and shape[:2] == (1, groups)
    if groups > 1 and not is_table:
        return None
    codes, scales = (each.evaluate(own.__getitem__) for each in (node.codes, node.scales))
    values = unpacked(codes, node.shape, node.bits).to(torch.int8).reshape(shape)
    columns: Tensor | None = None
    if isinstance(product, Mul):
        columns = product.b.evaluate(own.__getitem__).float().reshape(1, *shape[1:])
    fits = bool((values >= -8).all() and (values <= 7).all())
    return Integers(values, scales.float().reshape(-1), columns, 4 if fits else 8, int(is_table))


def _is_alone(expr: Expr, weights: dict[str, Expr]) -> bool:
    """Whether a weight is a stored tensor that no other reads."""
    refs = list(expr.refs)
    if len(refs) != 1 or math.prod(expr.shape) != math.prod(expr.refs[refs[0]]):
        return False
    plain = expr == reshape(Ref(refs[0], expr.refs[refs[0]]), expr.shape)
    return (
        plain
        and refs[0].startswith(PREFIX)
        and sum(refs[0] in e.refs for e in weights.values()) == 1
    )
