"""Multiply-adds of a model's forward pass, counted on shapes as PyTorch's own counter does.

`measure` runs the original once and counts every product by the formulas of
`torch.utils.flop_counter`: linear layers, convolutions, the products of attention. Each product is
booked on the weight that it reads, whatever module reads it. Where that can be done with factors
(`tied_module.takes_factors`), it may take fewer multiply-adds after a conversion
(`flops.fewest_macs`, by which `apply_factors(cache=True)` runs).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tiedconv.core.expr import Expr, MatMul
from tiedconv.core.pad import share_kept
from tiedconv.core.part import part
from tiedconv.core.workload import Piece, Times, Use, Workload
from tiedconv.runtime.example_inputs import evaluation
from tiedconv.runtime.flops import apply_macs, fewest_macs, never_materialized
from tiedconv.runtime.head_products import attentions_that_lose_heads
from tiedconv.runtime.lazy_weight import Resolved
from tiedconv.runtime.tied_module import stores_transposed, takes_factors

aten = torch.ops.aten


def work_of(weights: Mapping[str, Expr], of: Workload) -> int:
    """What a converted model takes, each weight in the form that takes least.

    Args:
        weights: those that were converted, by name.
        of: the original's; its unit is that of the result.
    """
    saved = sum(saved_work(expr, of.uses.get(name)) for name, expr in weights.items())
    return math.ceil(of.total - saved)


def saved_work(expr: Expr, use: Use | None) -> float:
    """What a converted weight takes less than the original's; below 0 if more.

    A weight of which some rows are used apart has factors applied for each of the parts, a factor
    that these share too.

    Args:
        expr: of the weight, or of some rows of it.
        use: of these rows.
    """
    if use is None or not use.pieces or not fewest_macs(expr)[1]:
        return 0
    # The last matrix of an attention is padded for removed heads alone.
    saved: float = use.heads * (1 - share_kept(expr))
    for piece in use.pieces:
        whole = (piece.start, piece.stop) == (0, expr.shape[0])
        rows = expr if whole else part(expr, 0, piece.start, piece.stop)
        weight = math.prod(rows.shape)
        applied = apply_macs(rows) or weight
        if piece.times is None:
            saved += piece.rows * (weight - applied)
        else:
            saved += _saved_time(rows, applied, piece.times)
    return saved


def _saved_time(expr: Expr, applied: int, times: Times) -> float:
    """Nanoseconds that some rows of a weight take less with factors, of so many multiply-adds."""
    share = applied / math.prod(expr.shape)
    if not any(isinstance(node, MatMul) for node in expr.walk()):
        return times.cut * times.whole * (1 - share)  # one product, of a layer that is as narrow
    factored = times.fixed + times.each * applied
    if times.limit is None:
        return max(0.0, times.whole - factored)
    return times.whole - factored if share <= times.limit or never_materialized(expr) else 0.0


def measure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Workload:
    """The workload of a plain model on one input.

    It runs on the meta device where the model can, which takes no arithmetic and no weights; else
    as it is. Fused kernels of attention are replaced by the products that they stand for.

    Args:
        model: its modes are restored.
        args, kwargs: the input, a batch of one.

    Raises:
        Exception: whatever the model raises on this input.
    """
    with evaluation(model), unfused():
        try:
            with _without_values(model):
                return _run(model, *_on_meta((args, dict(kwargs))))
        except Exception:  # what depends on values has none on the meta device
            if any(p.is_meta for p in model.parameters()):
                raise
            return _run(model, args, dict(kwargs))


@contextmanager
def unfused() -> Iterator[None]:
    """Attention and encoder layers as separate products, which a counter entered before sees."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Resolved():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Workload:
    counter = _Counter(_weights_of(model))
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                for handle in _noted(module, counter):
                    stack.callback(handle.remove)
        stack.enter_context(counter)
        model(*args, **kwargs)
    uses = {
        name: Use(
            macs,
            tuple(
                Piece(*ends, sum(rows), calls=len(rows))
                for ends, rows in counter.pieces[name].items()
            ),
            counter.heads[name],
        )
        for name, macs in counter.macs.items()
    }
    shapes = tuple(tuple(x.shape) for x in pytree.tree_leaves((args, kwargs)) if _is_tensor(x))
    return Workload(counter.total, uses, shapes)


@dataclass(frozen=True)
class _Weight:
    """A matrix or kernel of the model.

    Args:
        name: its first.
        shape: as it is stored.
        able: whether every module that holds it can apply factors of it.
        transposed: whether it is stored as `(in, out)`.
        in_attention: whether it is of an attention that runs with fewer heads.
    """

    name: str
    shape: torch.Size
    able: bool
    transposed: bool
    in_attention: bool


def _weights_of(model: nn.Module) -> dict[int, _Weight]:
    """The weights of a model by their storages."""
    found: dict[int, _Weight] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    attentions = attentions_that_lose_heads(model)
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if p is not None and p.ndim > 1:
                able, key = takes_factors(module, attribute), _storage(p)
                able = able and (key not in found or found[key].able)
                name = names[id(p)]
                found[key] = _Weight(
                    name, p.shape, able, stores_transposed(module), name.startswith(attentions)
                )
    return found


@contextmanager
def _without_values(model: nn.Module) -> Iterator[None]:
    """Within it the tensors of a model are on the meta device; those it shares stay shared."""
    held: list[dict[str, Any]] = []
    for module in model.modules():
        held += [module._parameters, module._buffers]
    own = [dict(tensors) for tensors in held]
    empty: dict[int, Tensor] = {}
    try:
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = empty.setdefault(id(tensor), _empty_like(tensor))
        yield
    finally:
        for tensors, before in zip(held, own, strict=True):
            tensors.update(before)


def _empty_like(tensor: Tensor) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=False)
    return tensor.detach().to("meta")


def _noted(module: nn.Module, counter: _Counter) -> Iterator[Any]:
    """Hooks that tell the counter when a convolution runs: its kernel may be read elsewhere too."""

    def enter(*_: object) -> None:
        counter.layer = _storage(module.weight)  # type: ignore[arg-type]

    def leave(*_: object) -> None:
        counter.layer = None

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products, and books each on the weight that it reads.

    Args:
        weights: by their storages.
    """

    def __init__(self, weights: Mapping[int, _Weight]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.layer: int | None = None  # the kernel of the convolution that runs
        self.macs: dict[str, int] = defaultdict(int)
        self.heads: dict[str, int] = defaultdict(int)
        self._of_activations = 0  # products since the last with a weight
        self.pieces: dict[str, dict[tuple[int, int], list[int]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._weights = weights

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
        if formula is None:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        if formula is not None:
            self._book(func._overloadpacket, formula(*args, **kwargs, out_val=out) // 2, args)
        return out

    def _book(self, op: Any, macs: int, args: tuple[Any, ...]) -> None:
        self.total += macs
        # Features may be a parameter too, such as a class token; the weight comes last.
        read = [x for x in args if _is_tensor(x) and _storage(x) in self._weights]
        if not read:
            self._of_activations += macs
            return
        weight = self._weights[_storage(read[-1])]
        self.macs[weight.name] += macs
        if weight.in_attention:  # what was multiplied before the last matrix of an attention
            self.heads[weight.name] += self._of_activations
        self._of_activations = 0
        ends = self._ends(op, weight, read[-1]) if weight.able else None
        if ends is not None:
            columns = math.prod(weight.shape[1:])
            self.pieces[weight.name][ends].append(macs // ((ends[1] - ends[0]) * columns))

    def _ends(self, op: Any, weight: _Weight, read: Tensor) -> tuple[int, int] | None:
        """The rows of a weight that a product reads, if factors can be applied in its place."""
        whole = 0, weight.shape[0]
        if op is aten.convolution:
            return whole if self.layer == _storage(read) else None
        if op not in (aten.mm, aten.addmm) or len(weight.shape) > 2:
            return None
        if weight.transposed:
            return whole if read.shape == weight.shape and read.is_contiguous() else None
        columns = weight.shape[1]
        if read.shape[0] != columns or read.stride(0) != 1:
            return None
        start = int(read.storage_offset()) // columns
        return start, start + int(read.shape[1])


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _storage(tensor: Tensor) -> int:
    """The same for a tensor and its views."""
    return int(tensor.untyped_storage()._cdata)


def _on_meta(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().to("meta") if _is_tensor(x) else x, value)
