"""Ties at run time: stored tensors on the root, weights as properties that evaluate.

The stored tensors are parameters of the root module. Every module with a converted weight gets a
subclass of its own class (see `tied_module`) in which the weight is a property that evaluates its
expression. So the model keeps its class and its methods, its `state_dict` holds each stored tensor
once, and copies, pickles, `.to`, compilers and optimisers see ordinary parameters. `untie` restores
the plain classes.

During fine-tuning a weight may be its expression plus a scaled constant offset (`set_offsets`),
which interpolates from the original to the compact weights. An offset is not a parameter and is
never written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Expr
from tiedconv.core.plan import Plan
from tiedconv.errors import PlanError, UserError
from tiedconv.runtime.computed_weight import plain
from tiedconv.runtime.other_tools import unwatch_tools, watch_tools
from tiedconv.runtime.tied_module import (
    EXPRS,
    FROZEN,
    OFFSET,
    OFFSET_SCALE,
    drop_buffers,
    is_factored,
    set_expressions,
)

_STATE = "_tiedconv_state"
_ORDER = "_tiedconv_order"  # of a module's parameters before some of them were tied


@dataclass(frozen=True)
class State:
    """What a tied model records: its plan, its source, and the history of what was done with it.

    `wide` is its plan from before its layers were made narrow (see `runtime.narrow_layers`): that
    of the original's shapes.
    """

    plan: Plan
    source: Mapping[str, Any] | None = None
    history: tuple[Mapping[str, Any], ...] = field(default=())
    wide: Plan | None = None

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
        plan: the expressions that replace them.
        factors: stored name to tensor, of the plan's shapes.

    Raises:
        UserError: the model is tied already.
        PlanError: the plan is not for this model, or a factor is missing or of another shape.
    """
    if is_tied(model):
        raise UserError(
            "This model is tied already",
            hint="Call tiedconv.untie on it first",
            code="already-tied",
        )
    converted = list(_iter_converted(model, plan))
    for name, shape in plan.factors.items():
        if name not in factors or tuple(factors[name].shape) != shape:
            found = tuple(factors[name].shape) if name in factors else "missing"
            raise PlanError(
                f"The factor {name} should be {shape} and is {found}", code="factor-mismatch"
            )
    # A factor trains if any weight that reads it did.
    trained: set[str] = set()
    for name, module, attribute in converted:
        parameter = module._parameters.get(attribute)
        if parameter is None:
            raise _missing_weight_error(name)
        if tuple(parameter.shape) != plan.weights[_canonical_name(plan, name)].shape:
            raise PlanError(
                f"The model's {name} is {tuple(parameter.shape)}, the plan's "
                f"{plan.weights[_canonical_name(plan, name)].shape}",
                "The plan is for another model",
                code="plan-model-mismatch",
            )
        if parameter.requires_grad:
            trained |= plan.weights[_canonical_name(plan, name)].refs.keys()
    # Floats first: model libraries take the type of the first parameter for that of the model.
    for name in sorted(plan.factors, key=lambda name: not factors[name].is_floating_point()):
        trains = name in trained and factors[name].is_floating_point()
        model.register_parameter(name, nn.Parameter(factors[name], requires_grad=trains))
    for name, module, attribute in converted:
        _bind(module, attribute, plan.weights[_canonical_name(plan, name)], model)
    model.__dict__[_STATE] = State(plan, source, history)
    watch_tools(model)


def untie(model: nn.Module) -> nn.Module:
    """Restore the plain weights and classes of a tied model, in place; returns it.

    Weights have the original's shapes (`runtime.narrow_layers.untie` cuts hidden units of zeros).
    Weights that the original model shared are shared again; ties of the plan are not. Offsets are
    dropped: the weights are those of the expressions alone. `apply_factors` is undone.

    Raises:
        UserError: the model is not tied.
    """
    plan = state_of(model).plan
    dense: dict[str, nn.Parameter] = {}
    unfreeze(model)
    clear_offsets(model)
    with torch.no_grad():
        for name, expr in plan.weights.items():
            value = expr.evaluate(model._parameters.__getitem__)  # type: ignore[arg-type]
            trained = any(_parameter(model, ref).requires_grad for ref in expr.refs)
            dense[name] = nn.Parameter(
                value.detach().clone(memory_format=torch.contiguous_format), trained
            )
    for name, module, attribute in list(_iter_converted(model, plan)):
        exprs = module.__dict__[EXPRS]
        set_expressions(module, {a: e for a, e in exprs.items() if a != attribute}, model)
        module._parameters[attribute] = dense[_canonical_name(plan, name)]
        _restore_order(module)
    for name in plan.factors:
        del model._parameters[name]
    unwatch_tools(model)
    del model.__dict__[_STATE]
    quantizer: Any = getattr(model, "hf_quantizer", None)  # of transformers
    if getattr(quantizer, "of_tied_model", False):
        quantizer.remove_quantization_config(model)
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
            "This model is not tied",
            hint="Convert it first, with tiedconv.convert(model)",
            code="not-tied",
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
    dense = OrderedDict((n, t) for n, t in own.items() if n not in plan.factors)
    with torch.no_grad():
        for name, expr in plan.weights.items():
            dense[name] = expr.evaluate(own.__getitem__).detach().contiguous()
    for alias, name in plan.aliases.items():
        dense[alias] = dense[name]
    # The versions of its modules, which some loaders ask for.
    dense._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]
    return dense


def freeze(model: nn.Module) -> nn.Module:
    """Cache every weight that takes arithmetic, for inference; returns the model in eval mode.

    Views need no arithmetic and are not cached, nor are the weights of generators, which would take
    far more memory than their factors: their layers always apply the factors. Training mode and
    loading a state dict drop the cache; if you change a stored tensor by hand, call `unfreeze`
    first.

    Raises:
        UserError: the model is not tied, or it has offsets, which the cache would keep.
    """
    return cache_weights(model)


def cache_weights(model: nn.Module, apart_from: Collection[str] = ()) -> nn.Module:
    """`freeze`, but for the weights of these names, which are not cached."""
    if has_offsets(model):
        raise UserError(
            "The weights of this model have offsets towards the original",
            "Frozen now, it would not be the model that is saved",
            "Call tiedconv.runtime.tie.clear_offsets on it first",
            code="offsets-set",
        )
    model.eval()
    unfreeze(model)
    for name, module, attribute in list(_iter_converted(model, state_of(model).plan)):
        expr = module.__dict__[EXPRS][attribute]
        if not (name in apart_from or expr.is_view or is_factored(module, attribute)):
            with torch.no_grad():
                value = plain(getattr(module, attribute)).detach().contiguous()
                module.register_buffer(FROZEN + attribute, value, persistent=False)
    return model


def tied_weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Expr]]:
    """Every converted weight: its name, the module and attribute that hold it, its expression."""
    for name, module, attribute in _iter_converted(model, state_of(model).plan):
        yield name, module, attribute, module.__dict__[EXPRS][attribute]


def is_frozen(module: nn.Module, attribute: str) -> bool:
    """Whether `freeze` has cached this weight of a module."""
    return FROZEN + attribute in module._buffers


def unfreeze(model: nn.Module) -> None:
    """Drop what `freeze` cached."""
    for module in model.modules():
        drop_buffers(module, FROZEN)


def set_offsets(model: nn.Module, offsets: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Let converted weights be `expression + scale * offset`; replaces earlier offsets.

    Offsets follow the model to another device and into copies. They are in no state dict and have
    no gradient; `save`, `untie` and `dense_state_dict` leave them out.

    Args:
        model: tied.
        offsets: names of converted weights to tensors of the weights' shapes; others have none.
        scale: factor of all offsets, usually from 0 to 1.

    Raises:
        PlanError: an unknown name, or a tensor of another shape than its weight.
    """
    plan = state_of(model).plan
    for name, offset in offsets.items():
        if name not in plan.weights:
            raise PlanError(
                f"An offset is given for {name}, which is not a converted weight",
                code="offset-mismatch",
            )
        if tuple(offset.shape) != plan.weights[name].shape:
            raise PlanError(
                f"The offset of {name} is {tuple(offset.shape)}, the weight "
                f"{plan.weights[name].shape}",
                code="offset-mismatch",
            )
    unfreeze(model)
    clear_offsets(model)
    for name, module, attribute in list(_iter_converted(model, plan)):
        offset_of = offsets.get(_canonical_name(plan, name))
        if offset_of is not None:
            stored = (_parameter(model, n) for n in module.__dict__[EXPRS][attribute].refs)
            like = next(p for p in stored if p.is_floating_point())
            value = offset_of.detach().to(like.device, like.dtype)
            module.register_buffer(OFFSET + attribute, value, persistent=False)
    model.__dict__[OFFSET_SCALE] = scale


def scale_offsets(model: nn.Module, scale: float) -> float:
    """Set the scale of the offsets; at 0 weights are exactly their expressions.

    Returns:
        the previous scale; 0 for a model without offsets, which is left unchanged.
    """
    before: float = model.__dict__.get(OFFSET_SCALE, 0.0)
    if has_offsets(model):
        model.__dict__[OFFSET_SCALE] = scale
    return before


def clear_offsets(model: nn.Module) -> None:
    """Drop the offsets and free their memory."""
    for module in model.modules():
        drop_buffers(module, OFFSET)
    model.__dict__.pop(OFFSET_SCALE, None)


def has_offsets(model: nn.Module) -> bool:
    """Whether offsets are set, at any scale."""
    return OFFSET_SCALE in model.__dict__


def _bind(module: nn.Module, attribute: str, expr: Expr, root: nn.Module) -> None:
    exprs = {**module.__dict__.get(EXPRS, {}), attribute: expr}
    module.__dict__.setdefault(_ORDER, tuple(module._parameters))
    del module._parameters[attribute]
    set_expressions(module, exprs, root)


def _restore_order(module: nn.Module) -> None:
    """Put parameters where the class has them: the state of an optimiser goes by position."""
    if EXPRS in module.__dict__:
        return  # another weight of it is still computed
    order = [name for name in module.__dict__.pop(_ORDER, ()) if name in module._parameters]
    found = {name: module._parameters.pop(name) for name in order}
    later = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({**found, **later})


def _iter_converted(model: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, str]]:
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
            raise _missing_weight_error(name) from None
        if (id(module), attribute) not in seen:
            seen.add((id(module), attribute))
            yield name, module, attribute


def _missing_weight_error(name: str) -> PlanError:
    return PlanError(
        f"The model has no parameter {name}",
        "The plan is for another model",
        "Use the file with the model it was made from",
        code="plan-model-mismatch",
    )


def _canonical_name(plan: Plan, name: str) -> str:
    return plan.aliases.get(name, name)


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    parameter = model._parameters[name]
    assert parameter is not None
    return parameter
