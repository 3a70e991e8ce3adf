"""Computed weights refuse to be changed: what was written to them would be lost without a word.

A computed weight is a new tensor each time it is read, so `module.weight.mul_(2)`, `nn.init` or
`weight.data = ...` would change a copy that nobody sees again. Read outside of a forward pass, a
weight is therefore a `ComputedWeight`: each operation on it gives plain tensors, and those that
change a tensor in place raise. Forward passes get plain tensors, as nothing is edited there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tiedconv.errors import UserError

# Functions of torch that run while a model computes; what reads a weight below them is no edit.
_FORWARD = frozenset({"forward", "_call_impl"})
_DEPTH = 12  # frames that are looked at
# Modules that replace parameters of a module by name, and would not find a computed one.
_REWRITERS = (
    "torch.nn.utils.prune",
    "torch.nn.utils.weight_norm",
    "torch.nn.utils.spectral_norm",
    "torch.nn.utils.parametrize",
    "torch.nn.utils.parametrizations",
    "torch.ao.quantization",
    "torchao.",
)
_SETTERS = frozenset({"__set__", "__setitem__", "__delete__"})


def refusal(what: str, stored: Iterable[str] = ()) -> UserError:
    """The error for an attempt to change a computed weight.

    Args:
        what: who wanted to do what.
        stored: the tensors that the weight is computed from.
    """
    names = ", ".join(stored)
    return UserError(
        f"{what} needs a plain weight, and this one is computed"
        + (f" from {names}" if names else ""),
        "What it writes would be lost",
        "Call tiedconv.untie(model) first, which gives plain weights (the file is then no longer "
        "compact), or change the stored tensors",
        code="weight-is-computed",
    )


class ComputedWeight(Tensor):
    """A tensor that can be read but not changed in place."""

    _tiedconv_stored: tuple[str, ...] = ()

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
        if isinstance(first, cls) and _writes(name):
            raise refusal(
                f"{name}()" if name[0] != "_" else "An assignment", first._tiedconv_stored
            )
        if any(isinstance(out, cls) for out in _several(kwargs.get("out"))):
            raise refusal(f"{name}(out=...)")
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(first, cls) and type(result) is Tensor and _same_memory(first, result):
            return guarded(result, first._tiedconv_stored)
        return result


def guarded(weight: Tensor, stored: Iterable[str]) -> Tensor:
    """A weight that refuses to be changed; a tensor of another library's class stays as it is.

    Args:
        weight: as it was computed.
        stored: the tensors that it is computed from, for the error.
    """
    if type(weight) not in (Tensor, torch.nn.Parameter, ComputedWeight):
        return weight  # such as a shard, whose class can't be joined with this one
    result = weight.as_subclass(ComputedWeight)
    result._tiedconv_stored = tuple(stored)
    return result


def plain(tensor: Tensor) -> Tensor:
    """The same as a plain tensor."""
    return tensor.as_subclass(Tensor) if isinstance(tensor, ComputedWeight) else tensor


def is_read_by_a_forward() -> bool:
    """Whether the code that reads a weight runs within a forward pass, a compiler or a tracer.

    Raises:
        UserError: it is a tool that would replace the weight (`weight-is-computed`).
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    frame = sys._getframe(2)
    reader = str(frame.f_globals.get("__name__"))
    if reader.startswith(_REWRITERS):
        raise refusal(f"{reader}.{frame.f_code.co_name}()")
    above = frame
    for _ in range(_DEPTH):
        if above.f_code.co_name in _FORWARD:
            return True
        if above.f_back is None:
            break
        above = above.f_back
    return False


def refuse_rewriters() -> None:
    """Refuse tools that ask whether a module is parametrized, to swap it or its weight.

    `register_parametrization` and `quantize_dynamic` ask so first of all. The one finds no
    parameter of this name; the other would leave the layer as it is, without a word.

    Raises:
        UserError: one of them asks (`weight-is-computed`).
    """
    frame = sys._getframe(2)
    for _ in range(4):
        reader, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if reader.startswith("torch.ao.") or function == "register_parametrization":
            raise refusal(f"{reader}.{function}()")
        if frame.f_back is None:
            return
        frame = frame.f_back


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    augmented = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    return in_place or augmented or name in _SETTERS


def _same_memory(one: Tensor, other: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _several(out: Any) -> Sequence[Any]:
    return out if isinstance(out, (list, tuple)) else (out,)
