"""Where bits and ranks went: a table of kinds of weight by layers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tiedconv.pages.tensors import TensorFigures

COLUMNS, ROWS = 64, 40
"""Layers and kinds of weight that are shown at most; the page says how many are left out."""
SHADES = 8
_LAYER = re.compile(r"(?<![^._])[0-9]{1,6}(?=\.)")


@dataclass(frozen=True)
class Cell:
    """A weight of one layer.

    Args:
        name: of its tensor.
        bits: in the file for each parameter of the original.
        ranks: of its low-rank parts.
        shade: of its background, from 0 to `SHADES`.
    """

    name: str
    bits: float
    ranks: tuple[int, ...]
    shade: int


@dataclass(frozen=True)
class LayerTable:
    """Weights of numbered layers.

    Args:
        layers: numbers, which the columns have.
        rows: (name with `*` for the number, one cell a layer or None).
        ranked: whether any has a rank.
        left_out: weights that are not in it.
    """

    layers: tuple[int, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    ranked: bool
    left_out: int


def layer_table(tensors: Sequence[TensorFigures]) -> LayerTable | None:
    """The table of a model's converted weights; None if no two of them are of numbered layers."""
    found: dict[str, dict[int, TensorFigures]] = defaultdict(dict)
    converted = [t for t in tensors if t.converted]
    for tensor in converted:
        if match := _LAYER.search(tensor.name):
            kind = f"{tensor.name[: match.start()]}*{tensor.name[match.end() :]}"
            found[kind.removesuffix(".weight")][int(match[0])] = tensor
    stacks = {kind: layers for kind, layers in found.items() if len(layers) > 1}
    if not stacks:
        return None
    kinds = list(stacks)[:ROWS]
    layers = sorted({layer for kind in kinds for layer in stacks[kind]})[:COLUMNS]
    shown = [[stacks[kind].get(layer) for layer in layers] for kind in kinds]
    most = max(_bits(t) for row in shown for t in row if t is not None)
    rows = tuple(
        (kind, tuple(_cell(t, most) for t in row)) for kind, row in zip(kinds, shown, strict=True)
    )
    there = [t for row in shown for t in row if t is not None]
    return LayerTable(tuple(layers), rows, any(t.ranks for t in there), len(converted) - len(there))


def _cell(tensor: TensorFigures | None, most: float) -> Cell | None:
    if tensor is None:
        return None
    bits = _bits(tensor)
    return Cell(tensor.name, bits, tensor.ranks, round(SHADES * bits / most) if most else 0)


def _bits(tensor: TensorFigures) -> float:
    return 8 * tensor.stored / max(1, tensor.parameters)
