"""One random symmetry of each kind, to find out whether it preserves the function of a block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.numerics.symmetries import (
    WeightEditor,
    fold_norm,
    permute_bottleneck,
    permute_heads,
    permute_hidden,
    scale_bottleneck_units,
    scale_conv_rows,
    scale_hidden,
    transform_heads,
)

Apply = Callable[[WeightEditor, Block, torch.Generator], None]


def applicable(block: Block) -> tuple[str, ...]:
    """Names of the symmetries that a whole block of this kind may have, see `RANDOM`."""
    names: list[str] = []
    if block.kind == "ffn":
        names += ["permute hidden units"] * block.permutable
        names += ["scale hidden units"] * (block.permutable and block.relu)
    elif block.kind == "attention" and block.permutable and block.heads:
        names += ["permute heads", "rotate q and k", "rotate v and o"]
    elif block.kind == "bottleneck":
        names += ["scale conv1 rows", "scale conv3 rows"]
        names += ["scale bottleneck units"] * block.relu
        conv1, conv2 = block.slots["conv1"], block.slots["conv2"]
        if block.permutable and conv2.columns == conv1.rows * math.prod(conv2.kernel):
            names += ["permute units after conv1", "permute units after conv2"]
    if "norm.weight" in block.vectors:
        names.append("fold norm")
    return tuple(names)


def _positive(count: int, generator: torch.Generator) -> Tensor:
    return 0.5 + 1.5 * torch.rand(count, generator=generator, dtype=torch.float64)


def _signed(count: int, generator: torch.Generator) -> Tensor:
    signs = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    return signs * _positive(count, generator)


def _order(count: int, generator: torch.Generator) -> Tensor:
    """A permutation; of a few units a cycle or a swap, which together generate all others."""
    if count > 16:
        return torch.randperm(count, generator=generator)
    order = torch.arange(count)
    if int(torch.randint(2, (1,), generator=generator)):
        return order.roll(1)
    order[: min(2, count)] = order[: min(2, count)].flip(0)
    return order


def _basis(block: Block, generator: torch.Generator) -> Tensor:
    """An invertible matrix for each head, `(heads, d_head, d_head)`."""
    assert block.heads
    d = block.slots["q"].rows // block.heads
    g = torch.randn(block.heads, d, d, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(g).Q * _positive(block.heads, generator)[:, None, None]
    return basis


def _conv_rows(i: int) -> Apply:
    def apply(editor: WeightEditor, block: Block, generator: torch.Generator) -> None:
        scale_conv_rows(editor, block, i, _signed(block.slots[f"conv{i}"].rows, generator))

    return apply


def _fold(editor: WeightEditor, block: Block, _: torch.Generator) -> None:
    """There is one way only to fold a norm."""
    fold_norm(editor, block)


RANDOM: Mapping[str, Apply] = {
    "scale conv1 rows": _conv_rows(1),
    "scale conv3 rows": _conv_rows(3),
    "scale bottleneck units": lambda e, b, g: scale_bottleneck_units(
        e, b, _positive(b.slots["conv3"].columns, g)
    ),
    "permute units after conv1": lambda e, b, g: permute_bottleneck(
        e, b, _order(b.slots["conv1"].rows, g), None
    ),
    "permute units after conv2": lambda e, b, g: permute_bottleneck(
        e, b, None, _order(b.slots["conv2"].rows, g)
    ),
    "permute hidden units": lambda e, b, g: permute_hidden(e, b, _order(b.slots["up"].rows, g)),
    "scale hidden units": lambda e, b, g: scale_hidden(e, b, _positive(b.slots["up"].rows, g)),
    "rotate q and k": lambda e, b, g: transform_heads(e, b, qk=_basis(b, g)),
    "rotate v and o": lambda e, b, g: transform_heads(e, b, vo=_basis(b, g)),
    "permute heads": lambda e, b, g: permute_heads(e, b, _order(b.heads or 0, g)),
    "fold norm": _fold,
}
"""The random symmetry of each name."""
