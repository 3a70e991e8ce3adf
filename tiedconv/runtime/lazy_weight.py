"""A weight that is evaluated once something needs its values; products apply its factors instead.

Some modules read the weight of a layer and compute with it themselves, as `nn.MultiheadAttention`
does with its projections, and some read no more than its type. Where factors are applied, both get
a tensor that knows its expression: a product with it, or with some of its rows, goes factor by
factor, its type and shape are known, and any other operation evaluates it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tiedconv.core.expr import Expr, Lookup, transpose
from tiedconv.core.part import part
from tiedconv.runtime.factored import NotFactorableError, apply
from tiedconv.runtime.factored_torch import Features

aten = torch.ops.aten


class LazyWeight(Tensor):
    """Stands for a weight of known shape, type and device."""

    _expr: Expr
    _lookup: Lookup

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """As for plain tensors; that there is such a method keeps modules from fused kernels."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Transposes and rows are lazy again, products apply factors, all else evaluates."""
        given = kwargs or {}
        if (view := _viewed(func, args)) is not None:
            return view
        if not given and func in (aten.mm.default, aten.addmm.default):
            *before, x, weight = args
            if isinstance(weight, cls) and not isinstance(x, cls):
                try:
                    product = apply(transpose(weight._expr), x, Features(weight._value_of))
                    return product + before[0] if before else product
                except NotFactorableError:
                    pass
        evaluated = pytree.tree_map_only(cls, lambda w: w._value_of(w._expr), (args, given))
        return func(*evaluated[0], **evaluated[1])

    def _value_of(self, expr: Expr) -> Tensor:
        return expr.evaluate(self._lookup)


class Resolved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it a mode that was entered before, such as a counter, sees the products of factors.

    A mode sees an operation before a tensor's class does, and would take the weight for a whole.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(isinstance(x, LazyWeight) for x in pytree.tree_leaves((args, kwargs))):
            return LazyWeight.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def lazy_weight(expr: Expr, lookup: Lookup) -> Tensor:
    """A weight that is evaluated when it is needed.

    Args:
        expr: of the weight.
        lookup: gives the stored tensor of a name.
    """
    stored = (lookup(name) for name in expr.refs)
    like = next(tensor for tensor in stored if tensor.is_floating_point())
    # Rows in order, as evaluated ones would be: views of it then have the usual strides.
    made = Tensor._make_wrapper_subclass(
        LazyWeight, torch.Size(expr.shape), dtype=like.dtype, device=like.device
    )
    made._expr, made._lookup = expr, lookup
    return made


def _viewed(func: Callable[..., Any], args: Sequence[Any]) -> Any:
    """The result of an operation that gives a transpose or rows of a matrix; None for others."""
    weight, *rest = args
    if not isinstance(weight, LazyWeight) or len(weight._expr.shape) != 2:
        return None
    expr, lookup = weight._expr, weight._lookup
    if func is aten.t.default or (
        func is aten.transpose.int and {d % 2 for d in rest} == {0, 1}
    ):  # fmt: skip
        return lazy_weight(transpose(expr), lookup)
    if func in (aten.detach.default, aten.alias.default):
        return lazy_weight(expr, lookup)
    if func in (aten.split.Tensor, aten.split_with_sizes.default):
        sizes, dim = rest[0], rest[1] if len(rest) > 1 else 0
        whole = expr.shape[0]
        if dim % 2 == 0:
            return [lazy_weight(part(expr, 0, a, b), lookup) for a, b in _ends(whole, sizes)]
    return None


def _ends(whole: int, sizes: int | Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of parts, given their sizes or the size of each but the last."""
    if isinstance(sizes, int):
        return [(at, min(at + sizes, whole)) for at in range(0, whole, sizes)]
    found, at = [], 0
    for size in sizes:
        found.append((at, at + size))
        at += size
    return found
