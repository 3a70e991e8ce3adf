"""Building the model that a file describes, within the size that the file records.

A file may name any model of a library with any arguments, and `depth=1000000` is an argument.
Here the library is stopped as soon as it makes more than a model of the recorded size needs.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from tiedconv.errors import SourceError

# A library may make more than it keeps: another head, a class for training.
_SPARE_PARAMETERS = 2**23
_SPARE_MODULES = 1_000
_LONGEST = 2**16  # tensors that are split into Python numbers, such as drop path rates

_MAKERS = frozenset(
    {
        "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
        "randint", "randn", "randperm", "tril_indices", "triu_indices", "zeros",
    }
)  # fmt: skip
_OUTER = frozenset({"cartesian_prod", "ger", "kron", "outer"})
_SHAPED_AS = frozenset({"reshape_as", "type_as", "view_as"})  # of the size of what they read
_LAYERS = frozenset(
    {
        "addmm", "batch_norm", "bmm", "conv1d", "conv2d", "conv3d", "group_norm", "layer_norm",
        "linear", "matmul",
    }
)  # fmt: skip
"""What a constructor may run to learn the shape of a backbone's output."""

_REPEATS = frozenset({"repeat", "repeat_interleave", "tile"})


@contextmanager
def bounded(parameters: int, tensors: int) -> Iterator[None]:
    """Within it, no model can be built that is much larger than recorded. For the current thread.

    Args:
        parameters: parameters and buffers that the model has.
        tensors: the number of tensors that hold them.

    Raises:
        SourceError: from the constructor of a model that is larger.
    """
    most = 2 * parameters + _SPARE_PARAMETERS
    left = {"parameters": most, "modules": 20 * tensors + _SPARE_MODULES}
    thread = threading.get_ident()

    def spend(what: str, count: int) -> None:
        if threading.get_ident() == thread:
            left[what] -= count
            if left[what] < 0:
                raise _too_large(parameters)

    def on_tensor(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        spend("parameters", 0 if tensor is None else tensor.numel())

    def on_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        spend("modules", 1)

    handles = [
        hooks.register_module_parameter_registration_hook(on_tensor),
        hooks.register_module_buffer_registration_hook(on_tensor),
        hooks.register_module_module_registration_hook(on_module),
    ]
    try:
        with _Bounded(parameters, most):
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Bounded(TorchFunctionMode):
    """Refuses operations whose result, or what they read, is larger than the whole model."""

    def __init__(self, parameters: int, most: int) -> None:
        super().__init__()
        self.parameters, self.most = parameters, most

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if _expected(name, func, args, kwargs) > self.most:
            raise _too_large(self.parameters)
        if name in ("__iter__", "tolist", "unbind") and max(args[0].shape, default=0) > _LONGEST:
            raise _too_large(self.parameters)
        return func(*args, **kwargs)


def _expected(
    name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> int:
    """How many parameters an operation reads, or is known to make."""
    if name in _MAKERS:
        try:
            return int(func(*args, **{**kwargs, "device": "meta", "out": None}).numel())
        except (RuntimeError, TypeError, ValueError, NotImplementedError, OverflowError):
            return _product(args)
    tensors = [t for t in _flat([*args, *kwargs.values()]) if isinstance(t, Tensor)]
    if not tensors:
        return 0
    sizes = [t.numel() for t in tensors]
    if name in _OUTER:
        return math.prod(sizes)
    if name in _REPEATS:
        return sizes[0] * _product(args[1:])
    if name in _LAYERS:
        return max(*sizes, _result_size(func, args, kwargs))
    if name in _SHAPED_AS or len({t.shape for t in tensors}) == 1:
        return max(sizes)
    try:
        # Neither all operations broadcast nor all arguments take part: it is a bound from above.
        together = math.prod(torch.broadcast_shapes(*(t.shape for t in tensors)))  # type: ignore[no-untyped-call]
    except RuntimeError:
        together = 0
    return max(*sizes, together, 0)


def _result_size(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Values in what a function returns, found without computing them; 0 if it refuses."""

    def empty(value: Any) -> Any:
        return value.detach().to("meta") if isinstance(value, Tensor) else value

    try:
        found = func(*map(empty, args), **{k: empty(v) for k, v in kwargs.items()})
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return 0
    return found.numel() if isinstance(found, Tensor) else 0


def _product(args: Sequence[Any]) -> int:
    return math.prod(n for n in _flat(args) if type(n) is int and n > 0)


def _flat(items: Sequence[Any]) -> Iterator[Any]:
    for item in items:
        if isinstance(item, list | tuple):
            yield from item
        else:
            yield item


def _too_large(parameters: int) -> SourceError:
    return SourceError(
        f"The file describes {parameters:,} parameters, but its model would be far larger",
        "The model was not built",
        "The file is damaged or forged: convert the model again",
        code="model-too-large",
    )
