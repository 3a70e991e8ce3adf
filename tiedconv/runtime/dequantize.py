"""A tied model whose integers are floats again, for formats that don't know packed codes."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor, nn

from tiedconv.core.expr import Dequantize, Expr, Mul, Ref, reshape
from tiedconv.core.plan import PREFIX, Plan
from tiedconv.core.storage import CODES
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of, tie, untie


def dequantize(model: nn.Module) -> nn.Module:
    """The model with each quantised matrix as one float tensor, in place; returns it.

    Ties stay. Weights that share nothing are plain parameters again.

    Raises:
        UserError: the model is not tied.
    """
    state = state_of(model)
    if not state.plan.codes:
        return model
    own = {name: t.detach() for name, t in state_tensors(model).items()}
    matrices: dict[str, Tensor] = {}

    def floats(expr: Expr) -> Expr:
        match expr:
            case Mul(a=Dequantize() as inner) | (Dequantize() as inner):
                (codes, *_) = inner.codes.refs
                name = codes.removesuffix(f"/{CODES}")
                matrices[name] = expr.evaluate(own.__getitem__)
                return Ref(name, expr.shape)
        return expr.map_children(floats)

    weights = {name: floats(expr) for name, expr in state.plan.weights.items()}
    alone = {name for name, expr in weights.items() if _is_alone(expr, weights)}
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
    return model


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
