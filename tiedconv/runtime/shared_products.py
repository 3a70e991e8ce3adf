"""A product that several layers of one input share, such as that of one basis for q, k and v."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SHARED = "_tiedconv_shared"
"""Key of it in the `__dict__` of a tied layer."""


class SharedProduct:
    """The last product with a factor, for the layers that multiply the same features by it.

    A compiler merges such products by itself, so there each layer computes its own.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def of(self, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """The product with these features: the last one, if they are the same tensor, unchanged.

        Args:
            x: features.
            compute: makes the product.
        """
        if torch.compiler.is_compiling():
            return compute()
        version = 0 if x.is_inference() else x._version
        last = self._last  # read once: another thread may replace it
        if last is not None and last[0]() is x and last[1] == version:
            return last[2]
        product = compute()
        self._last = (weakref.ref(x, self._forget), version, product)
        return product

    def _forget(self, _: object) -> None:
        self._last = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        del state
        self._last = None
