"""Which symmetries preserve the function of each block, found by trying them.

Names and shapes do not show whether heads may be permuted (a position bias for each head), rotated
(rotary positions, a norm of q and k) or hidden units permuted and scaled (gates, groups, clipped
activations). So before a symmetry is used on a block, a random one of its kind is applied to a copy
of the block in float64, and outputs are compared: on the inputs that the block receives when the
model runs, and on large random ones. What changes an output is not used on that block.

Where the model can't be run, the block is run alone if it takes a single tensor. Where that is not
possible either (weights that stay on disk), a symmetry is used if every module involved is of a
class that is known to have it (`conversion.exact_classes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from tiedconv.conversion.captured_inputs import (
    alone,
    captured_inputs,
    double_copy,
    in_double,
    random_activations,
)
from tiedconv.conversion.exact_classes import is_exact_block, is_exact_layer
from tiedconv.core.plan import Block
from tiedconv.errors import TiedconvError
from tiedconv.families.inspect import ModelInfo
from tiedconv.numerics.random_symmetries import RANDOM, applicable
from tiedconv.numerics.symmetries import WeightEditor
from tiedconv.runtime.example_inputs import Arguments, Example, evaluation
from tiedconv.runtime.outputs import floating_tensors, is_within
from tiedconv.runtime.tensors import state_tensors

TOLERANCE = 1e-6
"""Largest change of an output, relative to its largest entry, that counts as rounding.

In float64 rounding is 1e-12; a block that computes a part in float32 is off by up to 1e-6.
"""


class SymmetryProof:
    """Decides for each block and symmetry, once; call it with both.

    Args:
        info: of the model.
        model: with its weights; None where they can't be loaded.
        example: gives what the model is run on; None to try usual inputs.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: nn.Module | None,
        example: Callable[[], Example | None] | None = None,
    ) -> None:
        self._info, self._model, self._example = info, model, example
        self._found: dict[tuple[str, str], frozenset[str]] = {}
        self._inputs: list[dict[str, Arguments]] | None = None
        self._second_names: dict[str, list[str]] = {}
        for name, first in info.aliases.items():
            self._second_names.setdefault(first, []).append(name)

    def __call__(self, block: Block, symmetry: str) -> bool:
        """Whether a symmetry, by its name in `RANDOM`, preserves the function of a block."""
        key = (block.kind, block.name)
        if key not in self._found:
            names = applicable(block)
            if self._model is None:
                proven = frozenset(n for n in names if self._is_listed(block, [n]))
            else:
                proven = self._proven(block, names)
            self._found[key] = proven
        return symmetry in self._found[key]

    def _proven(self, block: Block, names: Sequence[str]) -> frozenset[str]:
        # All of them together first: one run instead of many. Random ones do not cancel.
        if self._preserves(block, names):
            return frozenset(names)
        if len(names) == 1:
            return frozenset()
        return frozenset(name for name in names if self._preserves(block, [name]))

    def _preserves(self, block: Block, names: Sequence[str]) -> bool:
        """Whether symmetries, one after the other, change no output of the block."""
        results = [
            next(
                (r for r in (self._compare(*run, block, names) for run in runs) if r is not None),
                None,
            )
            for runs in self._runs(block, names)
        ]
        known = [result for result in results if result is not None]
        return all(known) if known else self._is_listed(block, names)

    def _is_listed(self, block: Block, names: Sequence[str]) -> bool:
        """Whether classes alone say that a block has these symmetries."""
        hints, folds = self._info.hints, "fold norm" in names
        tensors = self._tensors(block, with_norm=folds)
        if len(set(map(self._others, tensors))) > 1:
            return False  # a part of it is another module's too
        own = _around(self._tensors(block, with_norm=False))
        return any(is_exact_block(place, hints) for place in own[:2]) and (
            not folds or is_exact_layer(_around(tensors)[0], hints)
        )

    def _others(self, tensor: str) -> tuple[str, ...]:
        """How the further names of a tensor differ from its first, as `layers.3` for `layers.1`."""
        parts = tensor.split(".")
        differing = []
        for name in self._second_names.get(tensor, ()):
            mine, others = parts.copy(), name.split(".")
            while mine and others and mine[-1] == others[-1]:
                mine.pop()
                others.pop()
            differing.append(f"{'.'.join(mine)} {'.'.join(others)}")
        return tuple(differing)

    def _runs(
        self, block: Block, names: Sequence[str]
    ) -> Iterator[Iterator[tuple[str, Arguments]]]:
        """For each kind of input: the modules around all that is edited, innermost first."""
        assert self._model is not None
        if self._inputs is None:
            self._inputs = self._captured()
        chain = self._ancestors(block, with_norm="fold norm" in names)
        for found in self._inputs:
            yield ((place, found[place]) for place in chain if place in found)
        if not self._inputs:
            first = next(iter(block.slots.values()))
            width = first.shape[1] if first.kernel else first.columns
            for place in chain[:-1]:
                module = self._model.get_submodule(place)
                yield ((place, given) for given in alone(module, width, spatial=bool(first.kernel)))

    def _captured(self) -> list[dict[str, Arguments]]:
        assert self._model is not None
        places = {
            place
            for _, block in self._info.blocks
            if applicable(block)
            for place in self._ancestors(block, with_norm=True)
        }
        example = None if self._example is None else self._example()
        return captured_inputs(self._model, sorted(places), example)

    def _ancestors(self, block: Block, *, with_norm: bool) -> list[str]:
        """Names of the modules around all tensors of a block, by all their names."""
        tensors = self._tensors(block, with_norm=with_norm)
        return _around([n for t in tensors for n in (t, *self._second_names.get(t, ()))])

    @staticmethod
    def _tensors(block: Block, *, with_norm: bool) -> list[str]:
        spans = (s for r, s in block.vectors.items() if with_norm or not r.startswith("norm."))
        return sorted({s.tensor for s in block.slots.values()} | {s.tensor for s in spans})

    def _compare(
        self, place: str, arguments: Arguments, block: Block, names: Sequence[str]
    ) -> bool | None:
        """Whether a module's outputs stay; None if the modules around it have to say.

        Those are asked where the module can't be run alone, and where only a further output
        changes (attention weights, one map for each head), which may be used or not.
        """
        assert self._model is not None
        module = double_copy(self._model.get_submodule(place))
        if module is None:
            return None
        own = state_tensors(module)
        prefix = f"{place}." if place else ""
        originals = {prefix + n: t.detach().clone() for n, t in own.items()}
        given = in_double(arguments)
        for trial, tried in enumerate((iter((given,)), random_activations(given))):
            runs = ((inputs, _outputs(module, inputs)) for inputs in tried)
            inputs, before = next(((i, o) for i, o in runs if o is not None), (given, None))
            if before is None:
                if trial:
                    continue  # it takes no other activations than the model's own
                return None
            if not before:
                return None
            editor = WeightEditor(originals)
            generator = torch.Generator().manual_seed(trial)
            for name in names:
                RANDOM[name](editor, block, generator)
            _load(own, prefix, editor.tensors, editor.edited)
            after = _outputs(module, inputs)
            _load(own, prefix, originals, editor.edited)
            if after is None or len(after) != len(before) or not _equal(before[0], after[0]):
                return False
            if not all(map(_equal, before, after)):
                return None
        return True


def _around(tensors: Sequence[str]) -> list[str]:
    """Names of the modules around some tensors, innermost first; the last is "", the model."""
    shared = tensors[0].split(".")[:-1]
    for name in tensors[1:]:
        parts = name.split(".")[:-1]
        same = [a == b for a, b in zip(shared, parts, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return [".".join(shared[:n]) for n in range(len(shared), -1, -1)]


def first_image(data: Dataset[Any]) -> Tensor | None:
    """The first of some images that can be read, as a batch of one; None if it is no tensor."""
    sized: Any = data
    for i in range(min(8, len(sized))):
        try:
            item = sized[i]
        except (OSError, TiedconvError, ValueError):
            continue
        found = item[0] if isinstance(item, tuple | list) else item
        return found.unsqueeze(0) if isinstance(found, Tensor) else None
    return None


def _load(
    own: Mapping[str, Tensor], prefix: str, tensors: Mapping[str, Tensor], names: set[str]
) -> None:
    with torch.no_grad():
        for name in names:
            own[name.removeprefix(prefix)].copy_(tensors[name])


def _outputs(module: nn.Module, arguments: Arguments) -> list[Tensor] | None:
    """The floating tensors that a module returns; None if it can't be run on these arguments."""
    args, kwargs = pytree.tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) else x, arguments
    )  # a module may change its input in place
    try:
        with evaluation(module):
            output = module(*args, **kwargs)
    except Exception:  # a user's module may fail in any way
        return None
    return floating_tensors(output)


def _equal(before: Tensor, after: Tensor) -> bool:
    return is_within(before, after, TOLERANCE)
