"""Cutting layers around hidden units to those that are stored, in a way that can be taken back."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.assemble import assemble
from tiedconv.core.expr import Cat, Expr, Reshape, transpose
from tiedconv.core.pad import Pad
from tiedconv.core.part import part
from tiedconv.core.plan import Slot
from tiedconv.core.units import area_of, is_depthwise
from tiedconv.runtime import tie
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tied_module import EXPRS, Forward, forward_of, set_expressions, set_forward

Ranges = Sequence[tuple[int, int]]
"""Rows that stay: first, and the one after the last."""

_OUT = frozenset({"out_features", "out_channels", "nf"})
_IN = frozenset({"in_features", "in_channels", "nx"})
_BOTH = frozenset({"num_features", "in_channels", "out_channels", "groups"})
"""Attributes of layers that hold the number of rows they write, columns they read, or both."""
_HEADS = frozenset(
    {"num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_head"}
)
_CHANNELS = frozenset({"attn_dim", "all_head_size", "inner_dim", "split_size", "kv_dim"})
"""Attributes of attentions that hold the number of heads, and that of channels of all heads."""


@dataclass(frozen=True)
class HiddenUnits:
    """Hidden units that a plan removes: the matrices that write and read them.

    Args:
        units: rows of each writer, those of all heads of an attention; a writer or reader may have
            several for each of these, as heads of queries that share one of keys.
        kept: of them; they come first.
        heads: whether the units are heads.
    """

    writers: tuple[Slot, ...]
    readers: tuple[Slot, ...]
    units: int
    kept: int
    heads: bool = False

    @property
    def tensors(self) -> list[str]:
        """Names of the weights, each once."""
        return [*dict.fromkeys(slot.tensor for slot in (*self.writers, *self.readers))]


class Cut:
    """Changes to a model and its plan that can be taken back.

    Args:
        model: tied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._undo = model, list[Callable[[], None]]()
        self._plan = tie.state_of(model).plan
        self._weights = dict(self._plan.weights)

    def hidden(self, place: HiddenUnits, between: Collection[nn.Module]) -> bool:
        """Narrow the layers around some hidden units; False for layers of an unknown kind."""
        done = list[nn.Module]()
        for tensor, slots in _by_tensor(place.writers).items():
            rows = _matrix_shape(self._weights[tensor], slots[0])[0]
            ranges = _rows_that_stay(slots, rows, place)
            modules = self._weight(slots[0], functools.partial(_rows_of, ranges=ranges))
            sizes = _BOTH if is_depthwise(slots[0]) else _OUT
            if not all(self._layer(module, sizes, rows, ranges) for module in modules):
                return False
            done += modules
        for slot in place.readers:
            columns = place.kept * (slot.columns // place.units)
            modules = self._weight(slot, functools.partial(part, dim=1, start=0, stop=columns))
            wide, left = slot.columns // area_of(slot), columns // area_of(slot)
            if not all(self._attributes(m, _IN, wide, left) for m in modules):
                return False
            done += modules
        ranges = [(0, place.kept)]
        return all(
            self._layer(module, _BOTH, place.units, ranges)
            for module in between
            if module not in done
        )

    def heads(self, place: HiddenUnits) -> None:
        """Set what counts heads in the modules around the matrices of an attention."""
        for name in _around(place.tensors):
            module = self._model.get_submodule(name)
            for attribute in _CHANNELS & vars(module).keys():
                any(
                    self._attributes(
                        module, {attribute}, slot.rows, place.kept * (slot.rows // place.units)
                    )
                    for slot in place.writers
                )
            for attribute in _HEADS & vars(module).keys():
                count = getattr(module, attribute)
                if isinstance(count, int) and count * place.kept % place.units == 0:
                    self._set(module, attribute, count * place.kept // place.units)

    def _layer(self, module: nn.Module, sizes: Collection[str], rows: int,
               ranges: Ranges) -> bool:  # fmt: skip
        """Cut what a layer has for each of so many rows."""
        kept = sum(stop - start for start, stop in ranges)
        if not self._attributes(module, sizes, rows, kept):
            return False
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None and tensor.dim() and len(tensor) == rows:
                    self._replace(held, name, torch.cat([tensor[a:b] for a, b in ranges]))
        return True

    def _attributes(
        self, module: nn.Module, names: Collection[str], before: int, after: int
    ) -> bool:
        """Set the attributes that a module has of some; False if one counts something else."""
        for attribute in vars(module).keys() & {*names}:
            if getattr(module, attribute) != before:
                return False
            self._set(module, attribute, after)
        return True

    def _weight(self, slot: Slot, cut: Callable[[Expr], Expr]) -> list[nn.Module]:
        """Cut the matrix of a weight's expression; returns the modules that have the weight."""
        matrix = cut(_matrix(self._weights[slot.tensor], slot))
        rows, columns = matrix.shape
        shape = (
            (columns, rows) if slot.transposed else (rows, columns // area_of(slot), *slot.kernel)
        )
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
        wide = tie.state_of(self._model).wide or self._plan
        tie.set_state(self._model, plan=plan, wide=wide)


def _matrix(expr: Expr, slot: Slot) -> Expr:
    """The `(out, in * kh * kw)` matrix of the whole tensor of a slot."""
    if slot.transposed:
        return transpose(expr)
    return expr.x if slot.kernel and isinstance(expr, Reshape) else expr


def rows_in(expr: Expr, slot: Slot) -> Expr:
    """The matrix of a slot of a weight; the whole one if the slot is."""
    matrix = _matrix(expr, slot)
    if slot == Slot.whole(slot.tensor, slot.shape, slot.transposed):
        return matrix  # its layer may be narrow already
    return part(matrix, 0, slot.start, slot.stop)


def without_padding(matrix: Expr) -> Expr:
    """A matrix without the zeros after it."""
    while isinstance(matrix, Pad):
        matrix = matrix.x
    return matrix


def _rows_that_stay(
    slots: Sequence[Slot], rows: int, place: HiddenUnits
) -> list[tuple[int, int]]:  # fmt: skip
    """Ranges of the rows of a tensor, of which those of some slots are cut to the first ones."""
    found, at = list[tuple[int, int]](), 0
    for slot in sorted(slots, key=lambda slot: slot.start):
        kept = place.kept * (slot.rows // place.units)
        found += [(at, slot.start), (slot.start, slot.start + kept)]
        at = slot.stop
    return [(start, stop) for start, stop in [*found, (at, rows)] if start < stop]


def _rows_of(matrix: Expr, ranges: Ranges) -> Expr:
    """Some rows of a matrix, one after another."""
    parts = [part(matrix, 0, start, stop) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else Cat(tuple(parts), 0)


def _by_tensor(slots: Sequence[Slot]) -> dict[str, list[Slot]]:
    found: dict[str, list[Slot]] = {}
    for slot in slots:
        found.setdefault(slot.tensor, []).append(slot)
    return found


def _around(tensors: Sequence[str]) -> set[str]:
    """Names of the modules around weights, from the one around all of them inwards."""
    paths = [name.split(".")[:-1] for name in tensors]
    levels = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    shared = len([*levels])
    return {".".join(path[:n]) for path in paths for n in range(shared, len(path) + 1)}


def _matrix_shape(expr: Expr, slot: Slot) -> tuple[int, int]:
    """Rows and columns of a weight as it is now."""
    rows, columns = expr.shape[0], math.prod(expr.shape[1:])
    return (columns, rows) if slot.transposed else (rows, columns)
