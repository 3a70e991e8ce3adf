"""What planning needs of a model: shapes, buffers, shared tensors, facts about modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from tiedconv.core.expr import Shape
from tiedconv.core.plan import Block
from tiedconv.core.workload import Workload
from tiedconv.errors import UserError
from tiedconv.families import Hints, find_blocks


@dataclass(frozen=True)
class ModelInfo:
    """A model as names, shapes and facts.

    Args:
        shapes: every tensor of the state dict under its first name, in the model's order.
        buffers: those that are not parameters.
        aliases: second names of shared tensors, to their first.
        hints: facts about modules, see `families.find_blocks`.
        fixed: tensors that are never converted: complex ones and integers.
        cautious: whether unmatched matrices are opt-in.
        workload: multiply-adds of one forward pass, where they were counted.
        times: its nanoseconds on this machine, where they were measured.
    """

    shapes: Mapping[str, Shape]
    buffers: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)
    hints: Hints = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    cautious: bool = False
    workload: Workload | None = None
    times: Workload | None = None

    @property
    def parameters(self) -> dict[str, Shape]:
        """Shapes of the parameters alone, each once."""
        return {n: s for n, s in self.shapes.items() if n not in self.buffers}

    @cached_property
    def blocks(self) -> Sequence[tuple[str, Block]]:
        """The result of `find_blocks`, computed once: a comparison drafts dozens of recipes."""
        shapes = {n: s for n, s in self.shapes.items() if n not in self.fixed}
        found = find_blocks(shapes, self.hints)
        if not self.cautious:
            return found
        return [(f, replace(b, opt_in=b.opt_in or b.unmatched)) for f, b in found]


def inspect_model(model: nn.Module) -> ModelInfo:
    """The info of a model.

    Raises:
        UserError: lazy parameters have no shapes yet (`lazy-parameters`).
    """
    first: dict[int, str] = {}
    shapes: dict[str, Shape] = {}
    aliases: dict[str, str] = {}
    parameters = {id(p) for p in model.parameters()}
    buffers: set[str] = set()
    fixed: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # the extra state of a module may be any object
        if is_lazy(tensor):
            raise UserError(
                f"{name} is a lazy parameter, whose shape is not known yet",
                "The model can't be converted",
                "Run the model once on an input, then convert it",
                code="lazy-parameters",
            )
        if id(tensor) in first:
            aliases[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        shapes[name] = tuple(tensor.shape)
        if not tensor.is_floating_point():
            fixed.add(name)
        if id(tensor) not in parameters:
            buffers.add(name)
    return ModelInfo(shapes, frozenset(buffers), aliases, _hints(model), frozenset(fixed))


def _hints(model: nn.Module) -> dict[str, float | str]:
    hints: dict[str, float | str] = {}
    for name, module in model.named_modules():
        hints[name] = kind = type(module).__name__
        hints[f"{name}.class"] = f"{type(module).__module__}.{type(module).__qualname__}"
        for attribute in ("num_heads", "num_attention_heads", "head_dim", "eps"):
            value = getattr(module, attribute, None)
            if isinstance(value, int | float):
                hints[f"{name}.{attribute}"] = value
        activation = module.__dict__.get("activation") or module.__dict__.get("intermediate_act_fn")
        if callable(activation):
            hints[f"{name}.activation"] = getattr(activation, "__name__", "")
        if "emb" in kind.lower() and ("rot" in kind.lower() or "rope" in kind.lower()):
            hints["rotary"] = 1.0
    return hints
