"""The numbered blocks of a model, and which of them each parameter works in.

Found in the names of the modules, so that it holds for any library: `blocks.3`,
`encoder.layers.encoder_layer_3`, `layer1.0`, `stages.0.layers.1`. A weight may be computed from
parameters that live elsewhere, such as tensors that several layers share; which ones is read off
the graph of its gradient, so nothing need be known of how it is computed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tiedconv.training.batchnorm import modes_kept

_DIGITS = re.compile(r"(.*[_-])?\d+")  # a component such as `3`, `encoder_layer_3`, `block1-0`
_ENDS_IN_DIGITS = re.compile(r".*\d+")  # `denselayer12` too, but also `conv1`


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


def block_names(matrices: list[str]) -> Callable[[str], str | None]:
    """A function from a tensor's name to the name of its block, or None outside of all blocks.

    A block is a numbered module with at least two matrices, most of which do not lie in numbered
    modules below it that are like this themselves: a stage holds blocks, but a block with a
    numbered part stays one. Where there is no such module, one matrix is enough.

    Args:
        matrices: names of the tensors of two or more dimensions.
    """
    for pattern, least in ((_DIGITS, 2), (_ENDS_IN_DIGITS, 2), (_DIGITS, 1)):
        counts: dict[str, int] = defaultdict(int)
        for name in matrices:
            for prefix in _numbered(name, pattern):
                counts[prefix] += 1
        candidates = {prefix for prefix, count in counts.items() if count >= least}
        inner: dict[str, int] = defaultdict(int)
        for name in matrices:
            found = [p for p in _numbered(name, pattern) if p in candidates]
            for outer in found[:-1]:
                inner[outer] += 1
        blocks = {p for p in candidates if inner[p] <= counts[p] / 2}
        if len(blocks) > 1:
            break
    else:
        blocks = set()

    def home(name: str) -> str | None:
        parts = name.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((prefix for prefix in prefixes if prefix in blocks), None)

    return home


def _numbered(name: str, pattern: re.Pattern[str]) -> Iterator[str]:
    """The prefixes of a tensor's name that end in a number, outermost first."""
    parts = name.split(".")
    for i, part in enumerate(parts[:-1], 1):
        if pattern.fullmatch(part):
            yield ".".join(parts[:i])


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
