"""How a model calls its modules, recorded in two probing forward passes.

Two batches of different sizes show which arguments of a module hold one entry for each image
and which are constants. A module whose call can't be made again from these is not replayable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tiedconv.training.objective import first_tensor

Place = Callable[[Tensor], Tensor]
Forward = Callable[[nn.Module, Tensor], Any]

SIZES = (2, 3)
"""Images in the two probing batches."""

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """A module's call: where per-image tensors go, and the constants beside them.

    Attributes:
        spec: the tree of (args, kwargs).
        leaves: its leaves; at a per-image tensor's place any value.
        batched: places of the per-image tensors.
    """

    spec: TreeSpec
    leaves: tuple[Any, ...]
    batched: tuple[int, ...]

    def run(self, module: nn.Module, tensors: Sequence[Tensor]) -> Tensor:
        """The first tensor of the module's output, given the per-image tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.batched, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        output = first_tensor(module(*args, **kwargs))
        assert output is not None  # the probe has seen one
        return output

    def pick(self, args: Any, kwargs: Any) -> list[Tensor]:
        """The per-image tensors of another call of the same form."""
        leaves, _ = tree_flatten((args, kwargs))
        return [leaves[place] for place in self.batched]


@dataclass
class _Record:
    spec: TreeSpec
    leaves: list[Any]
    versions: list[int]
    order: int
    calls: int = 1
    output: Tensor | None = None
    output_version: int = 0


@dataclass(frozen=True)
class Probe:
    """What two probing forwards of a model have shown.

    Attributes:
        calls: replayable modules, each called exactly once, by name, in order of execution.
        called: how often each module is called.
    """

    calls: dict[str, Call]
    called: dict[str, int]
    records: tuple[dict[str, _Record], ...]

    def link(self, first: str, then: str) -> tuple[int, ...] | None:
        """How the call of `then` follows from that of `first`, None if it doesn't.

        Returns:
            for each per-image tensor of `then`: -1 if it is the output of `first`, unchanged, or
            the place of the same tensor among those of `first`.
        """
        found = {self._link(records, first, then) for records in self.records}
        return found.pop() if len(found) == 1 else None

    def _link(self, records: dict[str, _Record], first: str, then: str) -> tuple[int, ...] | None:
        a, b = records[first], records[then]
        sources = [(a.output, a.output_version, -1)]
        for n, place in enumerate(self.calls[first].batched):
            sources.append((a.leaves[place], a.versions[place], n))
        link: list[int] = []
        for place in self.calls[then].batched:
            same = (b.leaves[place], b.versions[place])
            # The version shows whether anything was written into the tensor in between.
            match [n for tensor, version, n in sources if tensor is same[0] and version == same[1]]:
                case [n, *_]:
                    link.append(n)
                case _:
                    return None
        return tuple(link) if -1 in link else None


@torch.no_grad()
def probe(model: nn.Module, images: Tensor, forward: Forward) -> Probe:
    """Runs the model, in evaluation mode, on two small batches.

    Args:
        model: on its device.
        images: at least one, (B, ...).
        forward: runs the model on a batch.
    """
    runs: list[dict[str, _Record]] = []
    for size in SIZES:
        with _recording(model) as records:
            forward(model, images[torch.arange(size) % len(images)])
        runs.append(records)
    calls: dict[str, Call] = {}
    for name in sorted(runs[0], key=lambda n: runs[0][n].order):
        call = _replayable(runs[0][name], runs[1].get(name))
        if call is not None:
            calls[name] = call
    return Probe(calls, {name: r.calls for name, r in runs[0].items()}, tuple(runs))


@contextmanager
def _recording(model: nn.Module) -> Iterator[dict[str, _Record]]:
    records: dict[str, _Record] = {}

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in records:
                records[name].calls += 1
                return
            leaves, spec = tree_flatten((args, kwargs))
            records[name] = _Record(spec, leaves, [_version(v) for v in leaves], len(records))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            record, tensor = records[name], first_tensor(output)
            record.output, record.output_version = tensor, _version(tensor)

        return hook

    handles: list[Any] = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name)))
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _replayable(small: _Record, large: _Record | None) -> Call | None:
    """The call that both records show, None if it can't be made again."""
    if large is None or small.calls != 1 or large.calls != 1 or small.spec != large.spec:
        return None
    if not _per_image(small.output, large.output) or not _floating(small.output):
        return None
    batched: list[int] = []
    for place, (a, b) in enumerate(zip(small.leaves, large.leaves, strict=True)):
        if _per_image(a, b):
            batched.append(place)
        elif not _constant(a, b):
            return None
    return Call(small.spec, tuple(small.leaves), tuple(batched)) if batched else None


def _per_image(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or not a.ndim or not b.ndim:
        return False
    return (len(a), len(b)) == SIZES and a.shape[1:] == b.shape[1:]


def _constant(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return isinstance(a, _PLAIN) and type(a) is type(b) and a == b


def _floating(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
