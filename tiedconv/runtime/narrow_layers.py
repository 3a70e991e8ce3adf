"""Layers that compute no unit whose weights are zero.

A plan of scheme `narrow` pads weights with zeros: rows of the matrices that write hidden units, and
columns of the matrices that read them. Here the layers become as narrow as what is stored: their
attributes, biases, and norms and depthwise kernels between them are cut, and the expressions lose
their padding. Of an attention the units are its heads: the attributes that count these and their
channels are set too. The model stays tied, of a plan of narrower weights, and computes the same.

Whether a layer may be narrow depends on code that shapes do not show, so the model is run before
and after. Where it can't be run, or its outputs differ, its layers stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.core.pad import has_pads
from tiedconv.core.plan import Group, Plan
from tiedconv.core.units import Units, rows_of_units, units_among
from tiedconv.errors import UserError
from tiedconv.runtime import tie
from tiedconv.runtime.example_inputs import Example, as_arguments, evaluation, usual_inputs
from tiedconv.runtime.forward_check import is_out_of_memory
from tiedconv.runtime.layer_cut import Cut, HiddenUnits, rows_in, without_padding
from tiedconv.runtime.outputs import floating_tensors, is_within

ROUNDINGS = 200
"""Of the model's type and its largest output, by which outputs may differ."""
LARGEST = 0.05
"""Part of the largest output by which outputs may differ, whatever the type."""


@dataclass(frozen=True)
class Narrowed:
    """What `narrow_layers` did.

    Args:
        narrow: names of the weights whose layers are narrow now.
        left: names of padded weights whose layers stay as wide as the original's.
        reason: why; empty if none was left.
    """

    narrow: tuple[str, ...]
    left: tuple[str, ...]
    reason: str = ""


def narrow_layers(model: nn.Module, example: Example | None = None) -> Narrowed:
    """Make the layers of a tied model as narrow as the weights that are stored, in place.

    Its outputs stay the same: the model is run before and after. It can't be saved any more, as a
    file is of the original's layers; `untie`, `freeze`, `apply_factors` and exporters take it.

    Args:
        model: tied.
        example: an input of the model; None to try usual ones.

    Raises:
        UserError: the model is not tied.
    """
    plan = tie.state_of(model).plan
    if not has_pads(plan.weights.values()):
        return Narrowed((), ())
    if tie.has_offsets(model):
        raise UserError(
            "The weights of this model have offsets towards the original",
            "These have the shapes of the original's weights",
            "Call tiedconv.runtime.tie.clear_offsets on it first",
            code="offsets-set",
        )
    tie.unfreeze(model)
    places = list(_hidden_units(plan))
    kinds = [[example]] if example is not None else usual_inputs(model)
    order: list[nn.Module] = []
    for given in itertools.chain.from_iterable(kinds):
        order.clear()
        if before := _outputs(model, given, order):
            break
    else:
        return _result(plan, (), "the model could not be run on usual inputs (give an example)")

    def is_same() -> bool:
        return _alike(before, _outputs(model, given))

    if _try(model, places, is_same, order):
        return _result(plan, places)
    # One by one: which of them can't be?
    done = [place for place in places if _try(model, [place], is_same, order)]
    return _result(plan, done, "outputs would not be the same")


def untie(model: nn.Module, *, narrow: bool = True, example: Example | None = None) -> nn.Module:
    """Restore plain weights and classes of a tied model, in place; returns it.

    Weights that the original model shared are shared again; ties of the plan are not. Offsets are
    dropped: the weights are those of the expressions alone. `apply_factors` is undone.

    Args:
        model: tied.
        narrow: make layers whose hidden units were removed (scheme narrow) narrow, where that is
            possible (see `narrow_layers`); else all weights have the original's shapes.
        example: an input of the model, to check narrow layers on; None to try usual ones.

    Raises:
        UserError: the model is not tied.
    """
    tie.clear_offsets(model)
    if narrow:
        narrow_layers(model, example)
    return tie.untie(model)


def _result(plan: Plan, done: Sequence[HiddenUnits], reason: str = "") -> Narrowed:
    narrow = dict.fromkeys(name for place in done for name in place.tensors)
    left = tuple(n for n, e in plan.weights.items() if has_pads([e]) and n not in narrow)
    return Narrowed(tuple(narrow), left, reason if left else "")


def _hidden_units(plan: Plan) -> Iterator[HiddenUnits]:
    """What the groups of a plan remove and layers still have."""
    for group in plan.groups:
        slots = [member.slot for member in group.members]
        exprs = [plan.weights[slot.tensor] for slot in slots]
        if any(member.flip for member in group.members) or not has_pads(exprs):
            continue
        wide = [rows_in(expr, slot) for expr, slot in zip(exprs, slots, strict=True)]
        cores = [without_padding(matrix) for matrix in wide]
        for layer in _layers(group):
            units = rows_of_units(wide[i].shape[0] for i in layer.writers)
            kept = {cores[i].shape[0] * units // wide[i].shape[0] for i in layer.writers}
            kept |= {cores[i].shape[1] * units // wide[i].shape[1] for i in layer.readers}
            if len(kept) == 1 and (left := kept.pop()) < units:
                writers, readers = (
                    tuple(slots[i] for i in places) for places in (layer.writers, layer.readers)
                )
                yield HiddenUnits(writers, readers, units, left, layer.name == "heads")


def _layers(group: Group) -> list[Units]:
    """The hidden units of a group; where no roles are given, a matrix reads those before it."""
    if roles := str(group.options.get("roles", "")):
        return units_among(roles.split("-"))
    return [Units("", (i,), (i + 1,)) for i in range(len(group.members) - 1)]


def _try(model: nn.Module, places: Sequence[HiddenUnits], is_same: Callable[[], bool],
         order: Sequence[nn.Module]) -> bool:  # fmt: skip
    """Whether layers can be narrow; if not, they are as before."""
    cut = Cut(model)
    modules = {name: m for name, m, _, _ in tie.tied_weights(model)}
    for place in places:
        between = _between(order, [modules[name] for name in place.tensors])
        known = [m for m in between if _follows(m, place.units)]
        if not cut.hidden(place, known):
            break
        if place.heads:
            cut.heads(place)
    else:
        if is_same():
            cut.keep()
            return True
    cut.back()
    return False


def _between(order: Sequence[nn.Module], ends: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The modules that are called between the first and the last of some."""
    if any(module not in order for module in ends):
        return ()
    places = [order.index(module) for module in ends]
    return order[min(places) + 1 : max(places)]


def _follows(module: nn.Module, units: int) -> bool:
    """Whether a module treats each of so many channels by itself, with values of its own."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.num_features == units
    if not isinstance(module, nn.modules.conv._ConvNd):
        return False
    return module.groups == module.in_channels == module.out_channels == units


def _outputs(
    model: nn.Module, given: Example, order: list[nn.Module] | None = None
) -> list[Tensor] | None:
    """The floating tensors that a model returns, None if it can't be run.

    Args:
        model: run in evaluation mode.
        given: its input.
        order: gets the modules as they are called.
    """
    args, kwargs = as_arguments(given)
    hook = nn.modules.module.register_module_forward_pre_hook
    handle = hook(lambda module, _: order.append(module)) if order is not None else None
    try:
        with evaluation(model):
            output = model(*args, **kwargs)
    except Exception as error:  # models reject inputs with any error
        if is_out_of_memory(error):
            raise
        return None
    finally:
        if handle is not None:
            handle.remove()
    return floating_tensors(output)


def _alike(before: Sequence[Tensor], after: Sequence[Tensor] | None) -> bool:
    return (
        after is not None
        and len(before) == len(after)
        and all(map(_equal, before, after))
    )  # fmt: skip


def _equal(before: Tensor, after: Tensor) -> bool:
    return is_within(before, after, min(ROUNDINGS * torch.finfo(before.dtype).eps, LARGEST))
