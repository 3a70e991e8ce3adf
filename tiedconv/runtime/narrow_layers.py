"""Layers that compute no unit whose weights are zero.

A plan of scheme `narrow` pads weights with zeros: rows of the matrix that writes hidden units, and
columns of the matrix that reads them. Here the layers become as narrow as what is stored: their
attributes, biases, and norms and depthwise kernels between them are cut, and the expressions lose
their padding. The model stays tied, of a plan of narrower weights, and computes the same.

Whether a layer may be narrow depends on code that shapes do not show, so the model is run before
and after. Where it can't be run, or its outputs differ, its layers stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.assemble import assemble
from tiedconv.core.expr import Expr, Reshape, transpose
from tiedconv.core.pad import Pad, has_pads, padded
from tiedconv.core.plan import Plan, Slot
from tiedconv.errors import UserError
from tiedconv.runtime import tie
from tiedconv.runtime.example_inputs import Example, as_arguments, evaluation, usual_inputs
from tiedconv.runtime.forward_check import is_out_of_memory
from tiedconv.runtime.outputs import floating_tensors, is_within
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tied_module import EXPRS, Forward, forward_of, set_expressions, set_forward

ROUNDINGS = 200
"""Of the model's type and its largest output, by which outputs may differ."""
LARGEST = 0.05
"""Part of the largest output by which outputs may differ, whatever the type."""

_OUT = frozenset({"out_features", "out_channels", "nf"})
_IN = frozenset({"in_features", "in_channels", "nx"})
_BOTH = frozenset({"num_features", "in_channels", "out_channels", "groups"})
"""Attributes of layers that hold the number of units they write, read, or both."""


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


@dataclass(frozen=True)
class _Hidden:
    """Hidden units that a plan removes: the weights that write and read them."""

    writer: Slot
    reader: Slot
    units: int
    kept: int


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


def _result(plan: Plan, done: Sequence[_Hidden], reason: str = "") -> Narrowed:
    narrow = dict.fromkeys(slot.tensor for place in done for slot in (place.writer, place.reader))
    left = tuple(n for n, e in plan.weights.items() if has_pads([e]) and n not in narrow)
    return Narrowed(tuple(narrow), left, reason if left else "")


def _hidden_units(plan: Plan) -> Iterator[_Hidden]:
    """What the groups of a plan remove, between two members that follow each other."""
    for group in plan.groups:
        for first, second in itertools.pairwise(group.members):
            writer, reader = first.slot, second.slot
            if first.flip or second.flip or not (_is_whole(writer) and _is_whole(reader)):
                continue
            units, kept = writer.rows, _core(plan.weights[writer.tensor], writer).shape[0]
            columns = _core(plan.weights[reader.tensor], reader).shape[1]
            if kept < units and columns * units == kept * reader.columns:
                yield _Hidden(writer, reader, units, kept)


def _is_whole(slot: Slot) -> bool:
    return slot == Slot.whole(slot.tensor, slot.shape, slot.transposed)


def _core(expr: Expr, slot: Slot) -> Expr:
    """The `(out, in * kh * kw)` matrix of a weight without its padding."""
    matrix = expr
    if slot.transposed:
        matrix = transpose(expr)
    elif slot.kernel and isinstance(expr, Reshape):
        matrix = expr.x
    while isinstance(matrix, Pad) and len(matrix.shape) == 2:
        matrix = matrix.x
    return matrix


class _Cut:
    """Changes to a model and its plan that can be taken back.

    Args:
        model: tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._undo = model, list[Callable[[], None]]()
        self._plan = tie.state_of(model).plan
        self._weights = dict(self._plan.weights)

    def hidden(self, place: _Hidden, between: Collection[nn.Module]) -> bool:
        """Narrow the layers around some hidden units; False for layers of an unknown kind."""
        writers = self._weight(place.writer, rows=place.kept)
        readers = self._weight(place.reader, inputs=place.kept)
        layers = [
            *((module, _OUT) for module in writers), *((module, _IN) for module in readers),
            *((module, _BOTH) for module in between),
        ]  # fmt: skip
        for module, sizes in layers:
            for attribute in sizes & vars(module).keys():
                if getattr(module, attribute) != place.units:
                    return False
                self._set(module, attribute, place.kept)
        for module in (*writers, *between):
            for held in (module._parameters, module._buffers):
                for name, tensor in list(held.items()):
                    if tensor is not None and tensor.dim() and len(tensor) == place.units:
                        self._replace(held, name, tensor[: place.kept])
        return True

    def _weight(self, slot: Slot, **sizes: int) -> list[nn.Module]:
        """Take padding from a weight's expression; returns the modules that have the weight."""
        rows, columns = _matrix_shape(self._weights[slot.tensor], slot)
        rows = sizes.get("rows", rows)
        area = math.prod(slot.kernel)
        columns = sizes["inputs"] * area if "inputs" in sizes else columns
        matrix = padded(padded(_core(self._weights[slot.tensor], slot), 1, columns), 0, rows)
        shape = (columns, rows) if slot.transposed else (rows, columns // area, *slot.kernel)
        expr, _ = assemble([(Slot.whole(slot.tensor, shape, slot.transposed), matrix)])
        self._weights[slot.tensor] = expr
        found = []
        for name, module, attribute, _ in tie.tied_weights(self._model):
            if self._plan.aliases.get(name, name) == slot.tensor:
                before, forward = module.__dict__[EXPRS], forward_of(module)
                self._express(module, {**before, attribute: expr}, forward)
                self._undo.append(functools.partial(self._express, module, before, forward))
                found.append(module)
        return found

    def _express(self, module: nn.Module, exprs: Mapping[str, Expr], forward: Any) -> None:
        set_expressions(module, exprs, self._model)
        if forward is Forward.FACTORED_INFERENCE:
            set_forward(module, forward)

    def _set(self, module: nn.Module, attribute: str, value: int) -> None:
        self._undo.append(functools.partial(setattr, module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)

    def _replace(self, held: dict[str, Any], name: str, part: Tensor) -> None:
        self._undo.append(functools.partial(held.__setitem__, name, held[name]))
        new = part.detach().clone()
        is_parameter = isinstance(held[name], nn.Parameter)
        held[name] = nn.Parameter(new, held[name].requires_grad) if is_parameter else new

    def back(self) -> None:
        """The model as it was."""
        while self._undo:
            self._undo.pop()()

    def keep(self) -> None:
        """The changes are the model's plan from now on."""
        own = state_tensors(self._model)
        kept = {name: tuple(own[name].shape) for name in self._plan.kept}
        plan = dataclasses.replace(self._plan, weights=self._weights, kept=kept)
        tie.set_state(self._model, plan=plan, narrowed=True)


def _matrix_shape(expr: Expr, slot: Slot) -> tuple[int, int]:
    """Rows and columns of a weight as it is now."""
    rows, columns = expr.shape[0], math.prod(expr.shape[1:])
    return (columns, rows) if slot.transposed else (rows, columns)


def _try(model: nn.Module, places: Sequence[_Hidden], is_same: Callable[[], bool],
         order: Sequence[nn.Module]) -> bool:  # fmt: skip
    """Whether layers can be narrow; if not, they are as before."""
    cut = _Cut(model)
    modules = {name: m for name, m, _, _ in tie.tied_weights(model)}
    for place in places:
        between = _between(order, modules[place.writer.tensor], modules[place.reader.tensor])
        known = [m for m in between if _follows(m, place.units)]
        if not cut.hidden(place, known):
            break
    else:
        if is_same():
            cut.keep()
            return True
    cut.back()
    return False


def _between(
    order: Sequence[nn.Module], first: nn.Module, last: nn.Module
) -> Sequence[nn.Module]:  # fmt: skip
    """The modules that are called between two others."""
    if first not in order or last not in order:
        return ()
    start = order.index(first)
    return order[start + 1 : order.index(last)]


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
