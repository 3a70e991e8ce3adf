"""Integers of 2 to 8 bits, packed into bytes without gaps.

The codes of a matrix follow one another row by row, the first in the lowest bits: eight codes of
b bits take b bytes. For 4 bits that is the order of ONNX's INT4, the first of two codes in the
lower half. A code c stands for the integer `c - 2 ** (bits - 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits that a code may have."""

_AT_ONCE = 8  # codes that fill whole bytes, whatever their width


def integers_of(bits: int) -> tuple[int, int]:
    """The least and the largest integer of a width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def packed_length(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * bits // 8)


def packed(values: Tensor, bits: int) -> Tensor:
    """Pack integers.

    Args:
        values: whole numbers from `-2 ** (bits - 1)` to `2 ** (bits - 1) - 1`, of any shape.
        bits: of each code.

    Returns:
        uint8 `(packed_length(count, bits),)`.
    """
    codes: Tensor = values.reshape(-1).to(torch.int64) + 2 ** (bits - 1)
    if bits == 8:
        return codes.to(torch.uint8)
    length = packed_length(len(codes), bits)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % _AT_ONCE)).reshape(-1, _AT_ONCE)
    words: Tensor = (codes << _shifts(bits, _AT_ONCE, codes)).sum(1, keepdim=True)
    spread: Tensor = words >> _shifts(8, bits, codes) & 255
    return spread.to(torch.uint8).reshape(-1)[:length]


def unpacked(codes: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """The integers of packed codes.

    Args:
        codes: uint8, from `packed`.
        shape: of the result.
        bits: of each code.

    Returns:
        int8, of that shape.
    """
    if bits in (2, 4, 8):
        # A code lies within one byte.
        parts = codes.unsqueeze(-1) >> _shifts(bits, 8 // bits, codes) & (2**bits - 1)
    else:
        whole = torch.nn.functional.pad(codes, (0, -len(codes) % bits)).reshape(-1, bits).long()
        words = (whole << _shifts(8, bits, whole)).sum(1, keepdim=True)
        parts = words >> _shifts(bits, _AT_ONCE, words) & (2**bits - 1)
    values: Tensor = parts.reshape(-1)[: math.prod(shape)].to(torch.int16) - 2 ** (bits - 1)
    return values.to(torch.int8).reshape(tuple(shape))


def _shifts(step: int, count: int, like: Tensor) -> Tensor:
    """`0, step, 2 step, ...`."""
    return torch.arange(0, step * count, step, dtype=like.dtype, device=like.device)
