"""Modules whose weights are evaluated: subclasses made at run time, one for each class.

In such a subclass each converted weight is a property that evaluates its expression over the stored
tensors of the root module. A linear layer whose weight has a generated part (see `generated`) goes
further: its forward pass applies the factors, in training too, so that the weight is never made
unless somebody reads it. What a module does follows from its expressions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiedconv.core.expr import Expr, Lookup
from tiedconv.runtime.factored import never_materialized
from tiedconv.runtime.factored_torch import linear

# Keys of what tied modules keep in their `__dict__`, and prefixes of buffers beside a weight.
ROOT = "_tiedconv_root"
EXPRS = "_tiedconv_exprs"
FROZEN = "_tiedconv_frozen_"
OFFSET = "_tiedconv_offset_"
SHARE = "_tiedconv_offset_share"


def evaluate(module: nn.Module, exprs: Mapping[str, Expr], root: nn.Module) -> None:
    """Let these attributes of a module be evaluated, and no others; none gives its class back.

    Args:
        exprs: attribute to expression over the parameters of the root.
    """
    plain = _plain_class(module)
    if not exprs:
        module.__class__ = plain
        del module.__dict__[EXPRS]
        module.__dict__.pop(ROOT, None)
        return
    applies = plain.forward is nn.Linear.forward and (
        "weight" in exprs and never_materialized(exprs["weight"])
    )
    module.__class__ = _tied_class(plain, frozenset(exprs), applies)
    # Past nn.Module's __setattr__: the root must not become a child of its own child.
    module.__dict__[EXPRS] = dict(exprs)
    module.__dict__[ROOT] = root


def is_applied(module: nn.Module, attribute: str) -> bool:
    """Whether the module applies the factors of this weight itself, and never makes it."""
    return attribute == "weight" and type(module).forward is _apply


def lookup_of(module: nn.Module) -> Lookup:
    """What gives the stored tensors of this module's model by their names."""
    root: nn.Module = module.__dict__[ROOT]
    return root._parameters.__getitem__  # type: ignore[return-value]


def drop(module: nn.Module, prefix: str) -> None:
    """Remove the buffers of a module whose names begin so."""
    for name in [n for n in module._buffers if n.startswith(prefix)]:
        delattr(module, name)


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__mro__[1] if EXPRS in module.__dict__ else cls


_classes: dict[tuple[type[nn.Module], frozenset[str], bool], type[nn.Module]] = {}


def _tied_class(
    base: type[nn.Module], attributes: frozenset[str], applies: bool
) -> type[nn.Module]:  # fmt: skip
    """The subclass of `base` in which `attributes` are evaluated, made once."""
    key = (base, attributes, applies)
    if key not in _classes:
        _classes[key] = _make_tied_class(*key)
    return _classes[key]


def _make_tied_class(
    base: type[nn.Module], attributes: frozenset[str], applies: bool
) -> type[nn.Module]:  # fmt: skip
    def reduce_ex(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        # A class made at run time can't be pickled by name: pickle how to make it again.
        return _empty, (base, attributes, applies), self.__getstate__()  # type: ignore[no-untyped-call]

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            drop(self, FROZEN)
        return base.train(self, mode)

    def load(self: nn.Module, *args: Any) -> None:
        drop(self, FROZEN)
        base._load_from_state_dict(self, *args)

    namespace: dict[str, Any] = {
        "__reduce_ex__": reduce_ex,
        "train": train,
        "_load_from_state_dict": load,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    namespace |= {attribute: property(_getter(attribute)) for attribute in attributes}
    namespace |= {"forward": _apply} if applies else {}
    made: type[nn.Module] = type(base)(base.__name__, (base,), namespace)  # type: ignore[misc]
    return made


def _empty(base: type[nn.Module], attributes: frozenset[str], applies: bool) -> nn.Module:
    cls = _tied_class(base, attributes, applies)
    return cls.__new__(cls)


def _getter(attribute: str) -> Any:
    frozen_name, offset_name = FROZEN + attribute, OFFSET + attribute

    def get(self: nn.Module) -> Tensor:
        frozen = self._buffers.get(frozen_name)
        if frozen is not None:
            return frozen
        root: nn.Module = self.__dict__[ROOT]
        expr: Expr = self.__dict__[EXPRS][attribute]
        value = expr.evaluate(lookup_of(self))
        offset = self._buffers.get(offset_name)
        share: float = root.__dict__.get(SHARE, 0.0)
        # At 0 nothing is added: the bits are those of a model without offsets.
        return torch.add(value, offset, alpha=share) if offset is not None and share else value

    return get


def _apply(self: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a linear layer by the factors of its weight."""
    root: nn.Module = self.__dict__[ROOT]
    expr: Expr = self.__dict__[EXPRS]["weight"]
    y = linear(expr, x, lookup_of(self))
    offset = self._buffers.get(OFFSET + "weight")
    share: float = root.__dict__.get(SHARE, 0.0)
    if offset is not None and share:
        y = torch.add(y, F.linear(x, offset), alpha=share)
    bias: Any = self.bias
    # In place, as y is large, and nobody else's: no product keeps its result for the gradient.
    return y if bias is None else y.add_(bias)
