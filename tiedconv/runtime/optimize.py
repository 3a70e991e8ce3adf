"""The fastest form of each layer of a tied model, measured where it runs."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.expr import Expr, MatMul
from tiedconv.errors import UserError
from tiedconv.runtime import tie
from tiedconv.runtime.example_inputs import (
    Arguments,
    Example,
    as_arguments,
    evaluation,
    require_accepted,
    usual_inputs,
)
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.factored_torch import linear
from tiedconv.runtime.flops import apply_macs
from tiedconv.runtime.narrow_layers import narrow_layers
from tiedconv.runtime.outputs import floating_tensors, is_within
from tiedconv.runtime.stopwatch import in_turn
from tiedconv.runtime.tied_module import (
    EXPRS,
    FROZEN,
    Forward,
    forward_of,
    lookup_of,
    set_forward,
    share_product,
)

GAIN = 0.97
"""Factors are applied if they take at most this share of the time of the cached weight."""
WORTH_TIMING = 1.25
"""Factors that take more than this share of the weight's multiply-adds are never faster."""
TOLERANCE = 1e-4

KINDS = ("inference", "memory")


def optimize(
    model: nn.Module, for_: str = "inference", *, example: Example | None = None
) -> nn.Module:  # fmt: skip
    """Bring every layer of a tied model into its best form, in place, and return the model.

    For `inference` it is the fastest: hidden units of zeros are cut off (`narrow_layers`), every
    weight is computed once and cached (`freeze`), and a layer applies its factors instead where
    that was measured to take less time, on the model's device, for as many rows of features as the
    example gives it. Layers of one input whose weights share a factor, such as q, k and v of one
    basis, multiply by it once. For `memory` nothing is cached: factors are applied wherever
    possible, and integers stay packed.

    The model is in evaluation mode then, and gives the outputs that it gave before (checked on the
    example, to 1e-4 of the largest). `torch.compile`, `torch.export` and `copy.deepcopy` take it;
    `untie` undoes it; to train or save a model, optimize a copy of it.

    Args:
        model: tied.
        for_: `inference` or `memory`.
        example: an input of the model, as large as those that it will get: a tensor, a tuple of
            arguments or a dict of keyword arguments. Without it, inputs of usual shapes are tried.

    Raises:
        UserError: the model is not tied, can't be run on the example (`example-rejected`), or
            `for_` is unknown (`unknown-purpose`).
    """
    if for_ not in KINDS:
        raise UserError(
            f"Unknown purpose for_={for_!r}",
            "Nothing was changed",
            f"Use one of: {', '.join(KINDS)}",
            code="unknown-purpose",
        )
    arguments = _arguments(model, example)
    if for_ == "memory":
        tie.unfreeze(model)
        apply_factors(model)
        return model.eval()
    before = None if arguments is None else _outputs(model, arguments)
    narrow_layers(model, example)
    _cache_all(model)
    if arguments is None or before is None:
        return model
    layers = _Timer(model).layers(arguments)
    _choose(layers)
    if not _same(before, _outputs(model, arguments)):
        _cache_all(model)
        warnings.warn("With factors the outputs of this model change, so its weights are cached")
    return model


def _cache_all(model: nn.Module) -> None:
    """Compute every weight once, whatever forms the layers had before."""
    for _, module, attribute, _ in tie.tied_weights(model):
        if forward_of(module, attribute) is Forward.FACTORED_INFERENCE:
            set_forward(module, Forward.MATERIALIZED)
    tie.freeze(model)


Seconds = tuple[float, float, float]
"""Of a call with the cached weight, with factors, and of the product with the first factor."""


@dataclass
class _Layer:
    """A linear layer, convolution or attention that can apply factors, as it was called.

    Args:
        module: tied.
        attributes: its weights that can.
        seconds: of its first call; None before.
        call: the same for layers that were called on the same features, one after the other.
        factor: that features are multiplied by first, if it is a matrix of its own.
    """

    module: nn.Module
    attributes: tuple[str, ...]
    seconds: Seconds | None = None
    call: int = 0
    factor: Expr | None = None

    @property
    def exprs(self) -> list[Expr]:
        """Of its weights that can be factors."""
        own = self.module.__dict__[EXPRS]
        return [own[attribute] for attribute in self.attributes]


class _Timer:
    """Times layers at their place in a run of the model; layers that are alike once.

    Args:
        model: its weights are cached.
    """

    def __init__(self, model: nn.Module) -> None:
        able: dict[nn.Module, list[str]] = defaultdict(list)
        for _, module, attribute, expr in tie.tied_weights(model):
            macs = None if expr.is_view else apply_macs(expr)
            if forward_of(module, attribute) in (None, Forward.FACTORED) or macs is None:
                continue
            if macs <= WORTH_TIMING * math.prod(expr.shape):
                able[module].append(attribute)
        self._model = model
        self._layers = {module: _Layer(module, tuple(names)) for module, names in able.items()}
        self._known: dict[Any, Seconds] = {}
        self._last: Callable[[], Tensor | None] = lambda: None
        self._calls = 0

    def layers(self, arguments: Arguments) -> list[_Layer]:
        """Those that the model calls on this input, timed."""
        handles = [
            module.register_forward_pre_hook(self._note, with_kwargs=True)
            for module in self._layers
        ]
        try:
            with evaluation(self._model), torch.inference_mode():
                self._model(*arguments[0], **arguments[1])
        finally:
            for handle in handles:
                handle.remove()
        return [layer for layer in self._layers.values() if layer.seconds]

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = self._layers[module]
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        x = next(given, None)
        if layer.seconds is not None or x is None:
            return
        if self._last() is not x:
            self._calls, self._last = self._calls + 1, weakref.ref(x)
        layer.call, (expr, *_) = self._calls, layer.exprs
        plain = type(module).__mro__[1]
        if issubclass(plain, nn.Linear) and isinstance(expr, MatMul):
            layer.factor = expr.b
        sizes = tuple((e.shape, apply_macs(e)) for e in layer.exprs)
        key = (plain, sizes, tuple(x.shape), layer.factor is None)
        if key not in self._known:
            self._known[key] = _seconds(layer, x, args, kwargs)
        layer.seconds = self._known[key]


def _seconds(
    layer: _Layer, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Seconds:  # fmt: skip
    """Of a layer in both forms, and of its first product."""
    module = layer.module
    other = copy.copy(module)  # its tensors are those of the layer
    other.__dict__["_buffers"] = dict(module._buffers)
    _let_apply(dataclasses.replace(layer, module=other))
    runs: list[Callable[[], object]] = [
        lambda: module.forward(*args, **kwargs),  # without hooks: one of them calls this
        lambda: other.forward(*args, **kwargs),
    ]
    if (first := layer.factor) is not None:
        lookup = lookup_of(module)
        runs.append(lambda: linear(first, x, lookup))
    cached, applied, *rest = in_turn(runs, device=x.device)
    return cached, applied, rest[0] if rest else 0.0


def _let_apply(layer: _Layer) -> None:
    """Let a layer apply the factors of its weights: their cache is in the way."""
    for attribute in layer.attributes:
        delattr(layer.module, FROZEN + attribute)
    set_forward(layer.module, Forward.FACTORED_INFERENCE)


def _choose(layers: Sequence[_Layer]) -> None:
    """Let each layer, or all that share a product, apply factors where that is faster."""
    groups: dict[Any, list[_Layer]] = defaultdict(list)
    for layer in layers:
        groups[(layer.call, layer.factor) if layer.factor is not None else id(layer)].append(layer)
    for group in groups.values():
        times = [layer.seconds for layer in group if layer.seconds is not None]
        apart = sum(min(cached, applied) for cached, applied, _ in times)
        first = [seconds for *_, seconds in times]
        together = sum(applied for _, applied, _ in times) - sum(first) + max(first)
        if len(group) > 1 and together <= GAIN * apart:
            for layer in group:
                _let_apply(layer)
            share_product([layer.module for layer in group])
            continue
        for layer, (cached, applied, _) in zip(group, times, strict=True):
            if applied <= GAIN * cached:
                _let_apply(layer)


def _arguments(model: nn.Module, example: Example | None) -> Arguments | None:
    """An input that the model takes, None if it takes none that was tried."""
    tie.state_of(model)  # raises for a model that is not tied
    if example is not None:
        return require_accepted(model, example, "Nothing was changed")
    for kind in usual_inputs(model):
        for given in kind:
            arguments = as_arguments(given)
            try:
                _outputs(model, arguments)
            except Exception:  # models reject inputs with any error
                continue
            return arguments
    return None


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    with evaluation(model), torch.inference_mode():
        return floating_tensors(model(*arguments[0], **arguments[1]))


def _same(before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    pairs = zip(before, after, strict=False)
    return len(before) == len(after) and all(is_within(a, b, TOLERANCE) for a, b in pairs)
