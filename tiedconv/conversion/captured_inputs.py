"""The inputs that a model's modules receive when it runs, to run each of them alone."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tiedconv.runtime.example_inputs import (
    Arguments,
    Example,
    as_arguments,
    evaluation,
    on_device_of,
    require_accepted,
    usual_inputs,
)

FEW_TOKENS, FEW_PIXELS = 16, 8
"""Tokens, and pixels a side, of random inputs: what they try does not depend on their number."""


def require_example(model: nn.Module, example: Example) -> None:
    """Run a model on an input once.

    Raises:
        UserError: the model can't be run on it (`example-rejected`).
    """
    require_accepted(
        model, example, "Its blocks would not be run, so symmetries could not be tried on them"
    )


def captured_inputs(
    model: nn.Module, modules: Collection[str], example: Example | None = None
) -> list[dict[str, Arguments]]:
    """The arguments of the first call of each module, for each kind of input that the model takes.

    Runs are in evaluation mode and leave the random state as it was. If `example` is None, or
    rejected, inputs of usual shapes are tried: images of the sizes that the model or its
    configuration names, tokens, indices. A model may take more than one kind by chance, as an
    image as wide as its tokens, so all that it takes are returned.

    Args:
        model: with its weights; its modes are restored.
        modules: names of modules.
        example: an input of the model, such as images `(n, C, H, W)`.

    Returns:
        for each kind, module name to arguments; modules that were not called are missing.
    """
    if example is not None:
        found = _one_run(model, on_device_of(model, example), modules)
        if found is not None:
            return [found]
    runs: list[dict[str, Arguments]] = []
    for kind in usual_inputs(model):
        tried = (_one_run(model, given, modules) for given in kind)
        found = next((run for run in tried if run is not None), None)
        if found is not None:
            runs.append(found)
    return runs


def _one_run(
    model: nn.Module, given: Example, modules: Collection[str]
) -> dict[str, Arguments] | None:
    """The arguments of each module's first call; None if the model rejects the input."""
    found: dict[str, Arguments] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(_keeper(found, name), with_kwargs=True)
        for name in modules
    ]
    try:
        args, kwargs = as_arguments(given)
        with evaluation(model):
            model(*args, **kwargs)
    except Exception:  # models reject inputs with any error
        return None
    finally:
        for handle in handles:
            handle.remove()
    return found


def alone(module: nn.Module, width: int, *, spatial: bool) -> Iterator[Arguments]:
    """Inputs for a module that takes one tensor and nothing else, by its width.

    A module with further arguments, even optional ones, gives none: what the model passes there
    (positions, masks) is not known.
    """
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return
    if len(parameters) != 1 or parameters[0].kind is inspect.Parameter.VAR_KEYWORD:
        return
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, width, 8, 8)] if spatial else [(1, n, width) for n in (16, 49, 64, 197)]
    for shape in shapes:
        yield (torch.randn(shape, generator=generator, dtype=torch.float64),), {}


def in_double(arguments: Arguments) -> Arguments:
    """Arguments on the CPU, their floating tensors float64, complex ones complex128."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return value.double().cpu()
        return (value.to(torch.complex128) if value.is_complex() else value).cpu()

    return pytree.tree_map(wide, arguments)  # type: ignore[no-any-return]


def random_activations(arguments: Arguments) -> Iterator[Arguments]:
    """Arguments whose first floating tensor is replaced by large random numbers.

    Large ones reach what an activation does far from zero, such as a clipped ReLU. The same tensor
    passed twice (a query that is the key too) stays the same. If no other tensor is passed, few
    tokens or pixels come first, which a module may refuse.
    """
    tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.ndim > 0]
    if len(tensors) == 1 and tensors[0].ndim in (3, 4):
        shape = tensors[0].shape
        few = (1, FEW_TOKENS) if tensors[0].ndim == 3 else (1, shape[1], FEW_PIXELS, FEW_PIXELS)
        small = tuple(slice(0, n) for n in few)
        if tensors[0][small].numel() < tensors[0].numel():
            cut = pytree.tree_map(lambda x: x[small] if x is tensors[0] else x, arguments)
            yield _with_noise(cut)
    yield _with_noise(arguments)


def _with_noise(arguments: Arguments) -> Arguments:
    leaves, spec = pytree.tree_flatten(arguments)
    first = next(
        (x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1), None
    )
    if first is None:
        return arguments
    generator = torch.Generator().manual_seed(1)
    noise = 8 * torch.randn(first.shape, generator=generator, dtype=torch.float64)
    noise = noise.to(first.device, first.dtype)
    replaced = [noise if _is_same(x, first) else x for x in leaves]
    return pytree.tree_unflatten(replaced, spec)  # type: ignore[no-any-return]


def _is_same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and (a is b or (a.shape == b.shape and torch.equal(a, b)))


def _keeper(found: dict[str, Arguments], name: str) -> Callable[..., None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in found:
            own = tuple(map(_no_cache, args)), {key: _no_cache(x) for key, x in kwargs.items()}
            found[name] = pytree.tree_map(_copied, own)

    return keep


def _no_cache(value: Any) -> Any:
    """An argument, None for a cache of keys and values: it would grow with each run."""
    return None if hasattr(value, "get_seq_length") else value


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def double_copy(module: nn.Module) -> nn.Module | None:
    """A copy of a module in float64, on the CPU; None if it can't be copied."""
    try:
        return copy.deepcopy(module).double().cpu().eval()
    except Exception:  # a module may hold anything
        return None
