"""Ties at run time: stored tensors on the root, weights as properties that evaluate.

The stored tensors are parameters of the root module. Every module with a converted weight gets a
subclass of its own class (see `evaluated`) in which the weight is a property that evaluates its
expression. So the model keeps its class and its methods, its
`state_dict` holds each number once, and copies, pickles, `.to`, compilers and optimisers see
ordinary parameters. `untie` gives the plain class back.

For a time a weight may be its expression plus a share of a constant offset (`set_offsets`): the
road from the original to the compact model. An offset is no parameter and is never written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Expr
from tiedconv.core.plan import Plan
from tiedconv.errors import PlanError, UserError
from tiedconv.runtime.tied_module import EXPRS, FROZEN, OFFSET, SHARE, drop, evaluate, is_applied

_STATE = "_tiedconv_state"


@dataclass(frozen=True)
class State:
    """What a tied model knows of itself: its plan, where it came from, what was done with it."""

    plan: Plan
    source: Mapping[str, Any] | None = None
    history: tuple[Mapping[str, Any], ...] = field(default=())

    def __deepcopy__(self, memo: object) -> State:
        return self  # immutable


def tie(
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, Tensor],
    *,
    source: Mapping[str, Any] | None = None,
    history: tuple[Mapping[str, Any], ...] = (),
) -> None:
    """Replace the converted weights of a model by expressions over `factors`, in place.

    Args:
        model: with every weight that the plan converts, of the original shape.
        plan: what replaces them.
        factors: stored name to tensor, of the shapes that the plan says.

    Raises:
        PlanError: the plan is not for this model, or a factor is missing or of another shape.
    """
    if is_tied(model):
        raise UserError("This model is tied already", hint="Call tiedconv.untie on it first")
    places = list(_places(model, plan))
    for name, shape in plan.factors.items():
        if name not in factors or tuple(factors[name].shape) != shape:
            got = tuple(factors[name].shape) if name in factors else "missing"
            raise PlanError(f"The factor {name} should be {shape} and is {got}")
    # A factor trains if any weight that reads it did.
    trained: set[str] = set()
    for name, module, attribute in places:
        parameter = module._parameters.get(attribute)
        if parameter is None:
            raise _foreign(name)
        if tuple(parameter.shape) != plan.weights[_first(plan, name)].shape:
            raise PlanError(
                f"The model's {name} is {tuple(parameter.shape)}, the plan's "
                f"{plan.weights[_first(plan, name)].shape}",
                "The plan is for another model",
            )
        if parameter.requires_grad:
            trained |= plan.weights[_first(plan, name)].refs.keys()
    for name in plan.factors:
        model.register_parameter(name, nn.Parameter(factors[name], requires_grad=name in trained))
    for name, module, attribute in places:
        _bind(module, attribute, plan.weights[_first(plan, name)], model)
    model.__dict__[_STATE] = State(plan, source, history)


def untie(model: nn.Module) -> nn.Module:
    """Give a tied model its plain weights and classes back, in place; returns it.

    Weights that the original model shared are shared again; ties of the plan are not. Offsets are
    dropped: the weights are those of the expressions alone.
    """
    plan = state_of(model).plan
    made: dict[str, nn.Parameter] = {}
    unfreeze(model)
    clear_offsets(model)
    with torch.no_grad():
        for name, expr in plan.weights.items():
            value = expr.evaluate(model._parameters.__getitem__)  # type: ignore[arg-type]
            trained = any(_parameter(model, ref).requires_grad for ref in expr.refs)
            made[name] = nn.Parameter(
                value.detach().clone(memory_format=torch.contiguous_format), trained
            )
    for name, module, attribute in list(_places(model, plan)):
        exprs = module.__dict__[EXPRS]
        evaluate(module, {a: e for a, e in exprs.items() if a != attribute}, model)
        module._parameters[attribute] = made[_first(plan, name)]
    for name in plan.factors:
        del model._parameters[name]
    del model.__dict__[_STATE]
    return model


def is_tied(model: nn.Module) -> bool:
    """Whether this is the root of a tied model."""
    return _STATE in model.__dict__


def state_of(model: nn.Module) -> State:
    """The state of a tied model.

    Raises:
        UserError: it isn't tied.
    """
    state = model.__dict__.get(_STATE)
    if not isinstance(state, State):
        raise UserError(
            "This model is not tied", hint="Convert it first, with tiedconv.convert(model)"
        )
    return state


def set_state(model: nn.Module, **changes: Any) -> None:
    """Replace parts of a tied model's state."""
    model.__dict__[_STATE] = replace(state_of(model), **changes)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the original class: every weight under its own name, evaluated.

    Offsets are left out.
    """
    plan = state_of(model).plan
    own = model.state_dict()
    dense = {n: t for n, t in own.items() if n not in plan.factors}
    with torch.no_grad():
        for name, expr in plan.weights.items():
            dense[name] = expr.evaluate(own.__getitem__).detach().contiguous()
    for alias, name in plan.aliases.items():
        dense[alias] = dense[name]
    return dense


def freeze(model: nn.Module) -> nn.Module:
    """Cache every weight that takes arithmetic, for inference; returns the model in eval mode.

    Views cost nothing and are not cached, nor are the weights of generators, which would take far
    more memory than their factors and are applied by these (see `evaluated`). Training mode and
    loading a state dict drop the cache; if you change a stored tensor by hand, call `unfreeze`
    first.

    Raises:
        UserError: the model has offsets, which a cache would hide the end of.
    """
    if has_offsets(model):
        raise UserError(
            "This model is still part of the original: its weights have offsets",
            "Frozen now, it would not be the model that is saved",
            "Call tiedconv.binding.clear_offsets on it first",
        )
    model.eval()
    for _, module, attribute in list(_places(model, state_of(model).plan)):
        if not (module.__dict__[EXPRS][attribute].is_view or is_applied(module, attribute)):
            with torch.no_grad():
                module.register_buffer(
                    FROZEN + attribute,
                    getattr(module, attribute).detach().contiguous(),
                    persistent=False,
                )
    return model


def tied_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Expr]]:
    """Every converted weight: its name, the module and attribute that hold it, its expression."""
    for name, module, attribute in _places(model, state_of(model).plan):
        yield name, module, attribute, module.__dict__[EXPRS][attribute]


def is_frozen(module: nn.Module, attribute: str) -> bool:
    """Whether `freeze` has cached this weight of a module."""
    return FROZEN + attribute in module._buffers


def unfreeze(model: nn.Module) -> None:
    """Drop what `freeze` cached."""
    for module in model.modules():
        drop(module, FROZEN)


def set_offsets(model: nn.Module, offsets: Mapping[str, Tensor], share: float = 1.0) -> None:
    """Let converted weights be `expression + share * offset`; replaces offsets of before.

    Offsets follow the model to another device and into copies. They are in no state dict and have
    no gradient; `save`, `untie` and `dense_state_dict` leave them out.

    Args:
        model: tied.
        offsets: names of converted weights to tensors of the weights' shapes; others have none.
        share: how much of them counts, usually from 0 to 1.

    Raises:
        PlanError: a name that is no converted weight, or a tensor of another shape.
    """
    plan = state_of(model).plan
    for name, offset in offsets.items():
        if name not in plan.weights:
            raise PlanError(f"An offset is given for {name}, which is no converted weight")
        if tuple(offset.shape) != plan.weights[name].shape:
            raise PlanError(
                f"The offset of {name} is {tuple(offset.shape)}, the weight "
                f"{plan.weights[name].shape}"
            )
    unfreeze(model)
    clear_offsets(model)
    for name, module, attribute in list(_places(model, plan)):
        offset_of = offsets.get(_first(plan, name))
        if offset_of is not None:
            like = _parameter(model, next(iter(module.__dict__[EXPRS][attribute].refs)))
            value = offset_of.detach().to(like.device, like.dtype)
            module.register_buffer(OFFSET + attribute, value, persistent=False)
    model.__dict__[SHARE] = share


def scale_offsets(model: nn.Module, share: float) -> float:
    """Set how much of the offsets counts; at 0 weights are exactly their expressions.

    Returns:
        the share of before; 0 for a model without offsets, which stays as it is.
    """
    before: float = model.__dict__.get(SHARE, 0.0)
    if has_offsets(model):
        model.__dict__[SHARE] = share
    return before


def clear_offsets(model: nn.Module) -> None:
    """Drop the offsets and free their memory."""
    for module in model.modules():
        drop(module, OFFSET)
    model.__dict__.pop(SHARE, None)


def has_offsets(model: nn.Module) -> bool:
    """Whether `set_offsets` is in force, at whatever share."""
    return SHARE in model.__dict__


def _bind(module: nn.Module, attribute: str, expr: Expr, root: nn.Module) -> None:
    exprs = {**module.__dict__.get(EXPRS, {}), attribute: expr}
    del module._parameters[attribute]
    evaluate(module, exprs, root)


def _places(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
    """Every converted weight, aliases too, with the module and attribute that hold it, each once.

    Raises:
        PlanError: the model has no such module.
    """
    seen: set[tuple[int, str]] = set()
    for name in [*plan.weights, *(a for a, n in plan.aliases.items() if n in plan.weights)]:
        path, _, attribute = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise _foreign(name) from None
        if (id(module), attribute) not in seen:
            seen.add((id(module), attribute))
            yield name, module, attribute


def _foreign(name: str) -> PlanError:
    return PlanError(
        f"The model has no parameter {name}",
        "The plan is for another model",
        "Use the file with the model it was made from",
    )


def _first(plan: Plan, name: str) -> str:
    return plan.aliases.get(name, name)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter = model._parameters[name]
    assert parameter is not None
    return parameter
