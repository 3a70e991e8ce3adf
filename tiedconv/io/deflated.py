"""Codes in fewer bytes: the integers of a quantised tensor, by how often each occurs.

Integers near zero are the most frequent, so a Huffman code takes fewer bits than all codes have.
It is that of DEFLATE (RFC 1951) without its search for repeats, which weights don't have: raw, so
that any zlib reads it.
"""

from __future__ import annotations

import base64
import zlib

import torch
from torch import Tensor

from tiedconv.io.raw import bytes_of

WORTH = 0.98
"""Of its length at most, or a tensor stays as it is."""

PREFIX = "deflated:"
LONGEST = 32 * 2**20
"""Characters of a text."""


def deflated(codes: Tensor) -> Tensor | None:
    """The bytes of packed codes, deflated; None where that saves nothing.

    Args:
        codes: uint8 `(n,)`.
    """
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    data = coder.compress(bytes_of(codes)) + coder.flush()
    if len(data) > WORTH * len(codes):
        return None
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def inflated(data: Tensor, length: int) -> Tensor:
    """What `deflated` was given.

    Args:
        data: uint8, from a file.
        length: of the codes; no more memory than that is taken.

    Raises:
        ValueError: it is not what `deflated` gives for codes of this length.
    """
    coder = zlib.decompressobj(-15)
    try:
        found = coder.decompress(bytes_of(data), length)
        # The end of the data is read only once all codes have been.
        rest = coder.decompress(coder.unconsumed_tail, 1)
    except zlib.error as error:
        raise ValueError(f"its codes can't be inflated: {error}") from None
    if len(found) != length or rest or not coder.eof or coder.unused_data:
        raise ValueError(f"its codes are not {length:,} bytes")
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def deflated_text(text: str) -> str:
    """A text of ASCII in fewer characters."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    return PREFIX + base64.b85encode(coder.compress(text.encode()) + coder.flush()).decode()


def inflated_text(text: str) -> str:
    """What `deflated_text` was given.

    Raises:
        ValueError: it is not what that gives, or longer than `LONGEST`.
    """
    coder = zlib.decompressobj(-15)
    try:
        data = coder.decompress(base64.b85decode(text.removeprefix(PREFIX)), LONGEST)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"its metadata can't be inflated: {error}") from None
    if not coder.eof or coder.unused_data:
        raise ValueError("its metadata is longer than any model's, or cut off")
    return data.decode()
