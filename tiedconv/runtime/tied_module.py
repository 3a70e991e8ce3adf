"""Modules whose weights are evaluated: subclasses made at run time, one for each class.

In such a subclass each converted weight is a property that evaluates its expression over the stored
tensors of the root module. The forward pass of a linear layer may apply the factors instead (see
`Forward`): always where the weight has a generated part (see `generator`), so that the weight is
materialised only if it is read; for inference alone where `apply_factors` asks for it, and then of
a convolution too.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiedconv.core.expr import Expr, Lookup, MatMul
from tiedconv.runtime.computed_weight import (
    ComputedWeight,
    guarded,
    is_read_by_a_forward,
    refusal,
    refuse_rewriters,
)
from tiedconv.runtime.factored_conv import can_convolve, convolve
from tiedconv.runtime.factored_torch import linear
from tiedconv.runtime.flops import never_materialized
from tiedconv.runtime.lazy_weight import lazy_weight
from tiedconv.runtime.shared_products import SHARED, SharedProduct

# Keys of what tied modules keep in their `__dict__`, and prefixes of buffers beside a weight.
ROOT = "_tiedconv_root"
EXPRS = "_tiedconv_exprs"
FROZEN = "_tiedconv_frozen_"
OFFSET = "_tiedconv_offset_"
OFFSET_SCALE = "_tiedconv_offset_scale"

_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Forward(enum.Enum):
    """How the forward pass of a tied module uses a weight."""

    MATERIALIZED = "materialized"
    """As the class does: the weight is evaluated, or read from the cache of `freeze`."""
    FACTORED_INFERENCE = "factored-inference"
    """A linear layer or a convolution applies the factors in evaluation without gradients."""
    FACTORED = "factored"
    """A linear layer always applies the factors, in training and when frozen too."""


def set_expressions(module: nn.Module, exprs: Mapping[str, Expr], root: nn.Module) -> None:
    """Let these attributes of a module be evaluated, and no others; none restores its plain class.

    Args:
        exprs: attribute to expression over the parameters of the root.
    """
    plain = _plain_class(module)
    if not exprs:
        module.__class__ = plain
        del module.__dict__[EXPRS]
        module.__dict__.pop(ROOT, None)
        module.__dict__.pop(SHARED, None)
        return
    factored = plain.forward is nn.Linear.forward and (
        "weight" in exprs and never_materialized(exprs["weight"])
    )
    forward = Forward.FACTORED if factored else Forward.MATERIALIZED
    module.__class__ = _tied_class(plain, frozenset(exprs), forward)
    # Past nn.Module's __setattr__: the root must not become a child of its own child.
    module.__dict__[EXPRS] = dict(exprs)
    module.__dict__[ROOT] = root


def forward_of(module: nn.Module, attribute: str = "weight") -> Forward | None:
    """How a computed weight of a tied module is used; None for one that can apply no factors."""
    if not takes_factors(module, attribute):
        return None
    return getattr(type(module), "_tiedconv_forward", None)


def takes_factors(module: nn.Module, attribute: str = "weight") -> bool:
    """Whether what a module, tied or plain, does with a weight can be done with its factors.

    torch's own linear layers and convolutions can, and a multi-head attention, whose projections
    get a `LazyWeight`. A subclass with a forward pass of its own may use a weight in another way.
    """
    forward = _plain_class(module).forward
    if forward is nn.MultiheadAttention.forward:
        return attribute in _PROJECTIONS
    if attribute != "weight":
        return False
    if forward is nn.Conv2d.forward:
        return isinstance(module, nn.Conv2d) and can_convolve(module)
    return forward is nn.Linear.forward or stores_transposed(module)


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear layer stores its weight as `(in, out)`: the `Conv1D` of transformers."""
    plain = _plain_class(module)
    return (plain.__module__, plain.__name__) == ("transformers.pytorch_utils", "Conv1D")


def set_forward(module: nn.Module, forward: Forward) -> None:
    """Let a tied layer that can apply factors use its weight in another way."""
    attributes = frozenset(module.__dict__[EXPRS])
    module.__class__ = _tied_class(_plain_class(module), attributes, forward)
    module.__dict__.pop(SHARED, None)


def share_product(modules: Sequence[nn.Module]) -> None:
    """Let linear layers that apply factors compute the product with their first factor once.

    Args:
        modules: whose weights are products with the same last matrix, and which are called on the
            same features.
    """
    shared = SharedProduct()
    for module in modules:
        module.__dict__[SHARED] = shared


def is_factored(module: nn.Module, attribute: str) -> bool:
    """Whether the module always applies the factors of this weight and never materialises it."""
    return forward_of(module, attribute) is Forward.FACTORED


def lookup_of(module: nn.Module) -> Lookup:
    """The function from a name to the stored tensor of this module's model."""
    root: nn.Module = module.__dict__[ROOT]
    return root._parameters.__getitem__  # type: ignore[return-value]


def drop_buffers(module: nn.Module, prefix: str) -> None:
    """Remove the buffers of a module whose names begin with `prefix`."""
    for name in [n for n in module._buffers if n.startswith(prefix)]:
        delattr(module, name)


def _plain_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__mro__[1] if EXPRS in module.__dict__ else cls


_classes: dict[tuple[type[nn.Module], frozenset[str], Forward], type[nn.Module]] = {}


def _tied_class(
    base: type[nn.Module], attributes: frozenset[str], forward: Forward
) -> type[nn.Module]:  # fmt: skip
    """The subclass of `base` in which `attributes` are evaluated; the same one each time."""
    key = (base, attributes, forward)
    if key not in _classes:
        _classes[key] = _make_tied_class(*key)
    return _classes[key]


def _make_tied_class(
    base: type[nn.Module], attributes: frozenset[str], forward: Forward
) -> type[nn.Module]:  # fmt: skip
    def reduce_ex(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        # A class made at run time can't be pickled by name: pickle how to build it.
        return _empty, (base, attributes, forward), self.__getstate__()  # type: ignore[no-untyped-call]

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        if mode:
            drop_buffers(self, FROZEN)
        return base.train(self, mode)

    def load(self: nn.Module, *args: Any) -> None:
        drop_buffers(self, FROZEN)
        base._load_from_state_dict(self, *args)

    def set_attribute(self: nn.Module, name: str, value: Any) -> None:
        if name in attributes:
            raise refusal(f"Assigning {name}", self.__dict__[EXPRS][name].refs)
        base.__setattr__(self, name, value)

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if name in attributes or isinstance(param, ComputedWeight):
            raise refusal(f"Registering {name}")
        base.register_parameter(self, name, param)

    def parametrizations(self: nn.Module) -> Any:
        refuse_rewriters()
        raise AttributeError("parametrizations")  # this module has none

    def scriptable(self: nn.Module) -> nn.Module:
        raise refusal("torch.jit.script()")

    namespace: dict[str, Any] = {
        "__reduce_ex__": reduce_ex,
        "train": train,
        "_load_from_state_dict": load,
        "__setattr__": set_attribute,
        "register_parameter": register,
        "parametrizations": property(parametrizations),
        "__prepare_scriptable__": scriptable,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tiedconv_forward": forward,
    }
    lazy = forward is Forward.FACTORED_INFERENCE
    namespace |= {a: property(_getter(a, lazy=lazy)) for a in attributes}
    if (own := _FORWARDS.get((base.forward, forward))) is not None:
        namespace["forward"] = own
    tied: type[nn.Module] = type(base)(base.__name__, (base,), namespace)  # type: ignore[misc]
    return tied


def _empty(base: type[nn.Module], attributes: frozenset[str], forward: Forward) -> nn.Module:
    cls = _tied_class(base, attributes, forward)
    return cls.__new__(cls)


def _getter(attribute: str, *, lazy: bool) -> Any:
    """The getter of a computed weight; `lazy` if the layer itself may not need it."""
    frozen_name, offset_name = FROZEN + attribute, OFFSET + attribute

    def value_of(self: nn.Module, expr: Expr) -> Tensor:
        frozen = self._buffers.get(frozen_name)
        if frozen is not None:
            return frozen
        value = expr.evaluate(lookup_of(self))
        offset, scale = _offset_of(self, offset_name)
        return value if offset is None else torch.add(value, offset, alpha=scale)

    def get(self: nn.Module) -> Tensor:
        expr: Expr = self.__dict__[EXPRS][attribute]
        in_forward = is_read_by_a_forward()
        compiles = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if lazy and in_forward and not (compiles or _materializes(self, attribute)):
            return lazy_weight(expr, lookup_of(self))
        value = value_of(self, expr)
        return value if in_forward else guarded(value, expr.refs)

    return get


def _offset_of(module: nn.Module, name: str) -> tuple[Tensor | None, float]:
    """The offset of a weight and its scale; None at scale 0: the bits of no offset at all."""
    scale: float = module.__dict__[ROOT].__dict__.get(OFFSET_SCALE, 0.0)
    return (module._buffers.get(name) if scale else None), scale


def _factored(self: nn.Module, x: Tensor) -> Tensor:
    """The forward pass of a linear layer by the factors of its weight."""
    expr: Expr = self.__dict__[EXPRS]["weight"]
    lookup = lookup_of(self)
    shared: SharedProduct | None = self.__dict__.get(SHARED)
    if shared is not None and isinstance(expr, MatMul):
        first = expr.b
        y = linear(expr.a, shared.of(x, lambda: linear(first, x, lookup)), lookup)
    else:
        y = linear(expr, x, lookup)
    offset, scale = _offset_of(self, OFFSET + "weight")
    if offset is not None:
        y = torch.add(y, F.linear(x, offset), alpha=scale)
    bias: Any = self.bias
    # In place, as y is large and a new tensor: no product keeps its result for the gradient.
    return y if bias is None else y.add_(bias)


def _factored_for_inference(self: nn.Module, x: Tensor) -> Tensor:
    """Likewise, but in evaluation mode without gradients, cache or offset alone."""
    return nn.Linear.forward(self, x) if _materializes(self) else _factored(self, x)  # type: ignore[arg-type]


def _convolved_for_inference(self: nn.Conv2d, x: Tensor) -> Tensor:
    """The same for a convolution."""
    if _materializes(self):
        return nn.Conv2d.forward(self, x)
    y = convolve(self, self.__dict__[EXPRS]["weight"], x, lookup_of(self))
    bias: Any = self.bias
    return y if bias is None else y.add_(bias[:, None, None])


def _materializes(module: nn.Module, attribute: str = "weight") -> bool:
    """Whether a layer that applies factors for inference uses its weight now."""
    return (
        torch.is_grad_enabled()
        or module.training
        or FROZEN + attribute in module._buffers
        or _offset_of(module, OFFSET + attribute)[0] is not None
    )


_FORWARDS: dict[tuple[Any, Forward], Any] = {
    (nn.Linear.forward, Forward.FACTORED): _factored,
    (nn.Linear.forward, Forward.FACTORED_INFERENCE): _factored_for_inference,
    (nn.Conv2d.forward, Forward.FACTORED_INFERENCE): _convolved_for_inference,
}
