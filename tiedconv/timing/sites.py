"""The layers of a model that can apply factors, as small networks of their own to be timed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tiedconv.core.workload import Piece, Workload
from tiedconv.runtime.example_inputs import Arguments, evaluation
from tiedconv.runtime.tied_module import stores_transposed
from tiedconv.timing.inputs import length_of

RANKS = (0.15, 0.45, 0.85)
"""Of the rank at which two thin products take as many multiply-adds as the weight."""


Pair = tuple[int, int]
_NONE = (0, 0)


@dataclass(frozen=True)
class Site:
    """One product with a weight.

    Args:
        rows, columns: of the weight, `(out, in * kh * kw)`.
        shape: of the input, `(n, rows of features, in)` or `(n, in, H, W)`.
        kernel, stride, padding, dilation: of a convolution; (0, 0) for a linear layer.
        groups: of a convolution; with more than one it has no factors, but may become narrow.
    """

    rows: int
    columns: int
    shape: tuple[int, ...]
    kernel: Pair = _NONE
    stride: Pair = _NONE
    padding: Pair = _NONE
    dilation: Pair = _NONE
    groups: int = 1

    @property
    def ranks(self) -> list[int]:
        """The ranks to time; none for a weight too small to have any."""
        if self.groups > 1:
            return []
        even = self.rows * self.columns / (self.rows + self.columns)
        return sorted({max(1, round(share * even)) for share in RANKS}) if even > 4 else []

    def macs(self, rank: int) -> int:
        """Of a row of features, with factors of a rank."""
        return rank * (self.rows + self.columns)

    def layers(self, rank: int | None = None) -> nn.Sequential:
        """The layer itself, or the two thin ones of a rank."""
        if self.kernel == _NONE:
            if rank is None:
                return nn.Sequential(nn.Linear(self.columns, self.rows))
            thin = nn.Linear(self.columns, rank, bias=False)
            return nn.Sequential(thin, nn.Linear(rank, self.rows))
        channels = self.groups * self.columns // math.prod(self.kernel)

        def convolution(out: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(
                channels, out, self.kernel, self.stride, self.padding, self.dilation, self.groups,
                bias,
            )  # fmt: skip

        if rank is None:
            return nn.Sequential(convolution(self.rows, True))
        return nn.Sequential(convolution(rank, False), nn.Conv2d(rank, self.rows, 1))


Sites = Mapping[tuple[str, Piece], list[Site]]
"""By weight and piece of it: its products, one for each time that it is used."""


def sites_of(model: nn.Module, arguments: Arguments, workload: Workload, count: int) -> Sites:
    """The products of a model with weights that could be factors.

    Args:
        model: plain, its parameters in memory.
        arguments: what the workload was counted on.
        workload: of the model, in multiply-adds of that input.
        count: inputs at a time.
    """
    length = length_of(arguments)
    convolutions = _convolutions(model, arguments, count)
    transposed = _stored_transposed(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    found: dict[tuple[str, Piece], list[Site]] = {}
    for name, use in workload.uses.items():
        for piece in use.pieces:
            shape = shapes[name]
            if len(shape) == 4:
                found[name, piece] = convolutions.get(name, [])
                continue
            rows, columns = (shape[1], shape[0]) if name in transposed else shape
            if name not in transposed:
                rows = piece.stop - piece.start
            features = max(1, round(piece.rows / (length * piece.calls)))
            found[name, piece] = [Site(rows, columns, (count, features, columns))] * piece.calls
    return found


def _stored_transposed(model: nn.Module) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]
        for module in model.modules()
        if stores_transposed(module)
        for p in module.parameters(recurse=False)
    }


def _convolutions(model: nn.Module, arguments: Arguments, count: int) -> dict[str, list[Site]]:
    """The convolutions that are called, by the names of their kernels."""
    length, (args, kwargs) = length_of(arguments), arguments
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[Site]] = defaultdict(list)

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d)
        if isinstance(module.padding, str):
            return
        rows, columns = module.out_channels, math.prod(module.weight.shape[1:])
        size: Any = (
            module.kernel_size, module.stride, module.padding, module.dilation, module.groups,
        )  # fmt: skip
        images = given[0].shape[0] if given[0].ndim == 4 else 1
        at_a_time = max(1, images * count // length)
        found[names[id(module.weight)]].append(
            Site(rows, columns, (at_a_time, *given[0].shape[-3:]), *size)
        )

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if type(m) is nn.Conv2d]
    try:
        with evaluation(model), torch.inference_mode():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
