"""The numbered blocks of a model, and which of them each parameter works in.

A weight may be computed from parameters that live elsewhere, such as tensors that several layers
share; which ones is read off the graph of its gradient, so nothing need be known of how it is
computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.core.block_names import block_names
from tiedconv.training.batchnorm import modes_kept


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, in the order in which the model defines them.

    Args:
        names: of their modules.
        depths: for each parameter, by identity, the depths of the places where it is used,
            ascending: 0 before the blocks, i for the i-th block (counted from 1), `top` after
            them. Several where several layers share it.
    """

    names: tuple[str, ...]
    depths: Mapping[int, tuple[int, ...]]

    @property
    def top(self) -> int:
        """The depth of what follows the last block: a final norm, the classifier."""
        return len(self.names) + 1

    @classmethod
    def of(cls, model: nn.Module) -> Blocks:
        """Finds them; a model without numbered blocks has none, and all its depths are 0."""
        uses = _uses(model)
        home = block_names([use.name for use in uses if use.is_matrix])
        homes = [home(use.name) for use in uses]
        names = list(dict.fromkeys(block for block in homes if block is not None))
        last = max((i for i, block in enumerate(homes) if block is not None), default=len(uses))
        depths: dict[int, set[int]] = defaultdict(set)
        reached = 0
        for i, (use, block) in enumerate(zip(uses, homes, strict=True)):
            depth = reached if block is None else names.index(block) + 1
            reached = max(reached, depth)
            for parameter in use.parameters:
                depths[parameter].add(len(names) + 1 if i > last else depth)
        return cls(tuple(names), {key: tuple(sorted(found)) for key, found in depths.items()})


@dataclass(frozen=True)
class _Use:
    """One place where a module uses a parameter, or a weight computed from some."""

    name: str
    is_matrix: bool
    parameters: tuple[int, ...]  # by identity

    @classmethod
    def of(cls, name: str, value: Tensor) -> _Use:
        is_matrix = value.ndim > 1 and value.numel() > max(value.shape)
        return cls(name, is_matrix, tuple(id(p) for p in _parameters_of(value)))


def _uses(model: nn.Module) -> list[_Use]:
    """Every parameter and every computed weight, under its name in the module that uses it.

    A parameter from which weights are computed is used by these alone, not where it is stored.
    """
    found: list[tuple[bool, _Use]] = []
    # In training mode no weight comes from a cache, which would have no graph.
    with modes_kept(model), torch.enable_grad():
        model.train()
        for path, module in model.named_modules(remove_duplicate=False):
            prefix = f"{path}." if path else ""
            own = [(n, p) for n, p in module._parameters.items() if p is not None]
            found += [(False, _Use.of(prefix + n, p)) for n, p in own]
            found += [(True, _Use.of(prefix + n, w)) for n, w in _computed(module)]
    sources = {p for is_computed, use in found if is_computed for p in use.parameters}
    return [use for is_computed, use in found if is_computed or use.parameters[0] not in sources]


def _computed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights of a module that are properties of its very class."""
    for attribute, value in vars(type(module)).items():
        if isinstance(value, property) and attribute.endswith("weight"):
            weight = getattr(module, attribute)
            if isinstance(weight, Tensor):
                yield attribute, weight


def _parameters_of(value: Tensor) -> list[Tensor]:
    """The parameters that a tensor is computed from: itself, or the leaves of its graph."""
    if value.grad_fn is None:
        return [value]
    leaves: list[Tensor] = []
    seen, waiting = {value.grad_fn}, [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves
