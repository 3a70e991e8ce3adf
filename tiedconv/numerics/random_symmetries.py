"""One random symmetry of each kind, to find out whether it preserves the function of a block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tiedconv.core.plan import Block
from tiedconv.core.units import PERMUTES, count_of, units_of
from tiedconv.numerics.symmetries import (
    WeightEditor,
    fold_norm,
    permute_units,
    scale_bottleneck_units,
    scale_conv_rows,
    scale_hidden,
    transform_heads,
)

Apply = Callable[[WeightEditor, Block, torch.Generator], None]


def applicable(block: Block) -> tuple[str, ...]:
    """Names of the symmetries that a whole block of this kind may have, see `RANDOM`."""
    names = [PERMUTES[units.name] for units in units_of(block)] if block.permutable else []
    if block.kind == "ffn":
        names += ["scale hidden units"] * (block.permutable and block.relu)
    elif block.kind == "attention" and block.permutable and block.rotatable and block.heads:
        names += ["rotate q and k", "rotate v and o"]
    elif block.kind == "bottleneck":
        names += ["scale conv1 rows", "scale conv3 rows"]
        names += ["scale bottleneck units"] * block.relu
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


def _permuted(name: str) -> Apply:
    def apply(editor: WeightEditor, block: Block, generator: torch.Generator) -> None:
        for units in units_of(block):
            if units.name == name:
                count = count_of(block, units) or 0
                permute_units(editor, block, name, _order(count, generator))

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
    "scale hidden units": lambda e, b, g: scale_hidden(e, b, _positive(b.slots["up"].rows, g)),
    "rotate q and k": lambda e, b, g: transform_heads(e, b, qk=_basis(b, g)),
    "rotate v and o": lambda e, b, g: transform_heads(e, b, vo=_basis(b, g)),
    "fold norm": _fold,
    **{symmetry: _permuted(units) for units, symmetry in PERMUTES.items()},
}
"""The random symmetry of each name."""
