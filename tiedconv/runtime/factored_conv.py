"""The operations of `runtime.factored` for a convolution: features in the channels of an image.

The first product reads the image as the convolution does, with a kernel for each row of the first
factor; every product after it is a 1x1 convolution. A 1x1 kernel takes the pixels that its stride
leaves, and all its products are 1x1. Of a depthwise convolution the first channels alone may be
stored, the others being zero: then no others are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiedconv.core.expr import Expr, Lookup, MatMul
from tiedconv.runtime.factored import NotFactorableError, apply, matrix_of, require_values
from tiedconv.runtime.generator import Generated

CHANNELS = -3


def can_convolve(layer: nn.Conv2d) -> bool:
    """Whether a convolution can apply factors: of one group or depthwise, padding only zeros.

    A 1x1 kernel must not be padded: its products are taken at the pixels of the input alone.
    """
    point = tuple(layer.kernel_size) == (1, 1)
    depthwise = layer.groups == layer.in_channels == layer.out_channels and not point
    if (layer.groups > 1 and not depthwise) or layer.padding_mode != "zeros":
        return False
    return not point or layer.padding in ("valid", "same") or not any(layer.padding)


def convolve(layer: nn.Conv2d, expr: Expr, x: Tensor, lookup: Lookup) -> Tensor:
    """What a convolution gives by the factors of its weight, without the bias.

    Args:
        layer: see `can_convolve`.
        expr: of its weight, `(out, in, kh, kw)`.
        x: `(..., in, height, width)`.
        lookup: gives the stored tensor of a name.

    Raises:
        NotFactorableError: the weight must be materialised.
    """
    point = tuple(layer.kernel_size) == (1, 1)
    if point:
        down, across = layer.stride
        x = x[..., ::down, ::across]
    if layer.groups > 1 and any(isinstance(node, MatMul) for node in expr.walk()):
        raise NotFactorableError  # a product mixes channels
    on = Pixels(layer, lambda part: part.evaluate(lookup))
    return apply(matrix_of(expr), Image(x, patches=not point), on).value


@dataclass(frozen=True)
class Image:
    """Features of an image, `(..., channels, height, width)`.

    Args:
        value: the features.
        patches: whether the features are patches of it, which the kernel has yet to read.
    """

    value: Tensor
    patches: bool = False


class Pixels:
    """Products with features in the channels of an image.

    Args:
        layer: how patches are read.
        evaluate: gives the value of a stored matrix, or of a part of one.
    """

    def __init__(self, layer: nn.Conv2d, evaluate: Callable[[Expr], Tensor]) -> None:
        self.layer, self.evaluate = layer, evaluate

    def product(self, x: Image, matrix: Expr, transpose: bool) -> Image:
        """`x M^T`, or `x M` if `transpose`."""
        require_values(x.patches and transpose)
        stored, of = self.evaluate(matrix), self.layer
        if not x.patches:
            kernel = stored.t() if transpose else stored
            return Image(F.conv2d(x.value, kernel[:, :, None, None]))
        kernel, value = stored.reshape(len(stored), -1, *of.kernel_size), x.value
        groups = min(of.groups, len(stored))
        if of.groups > 1:
            value = value.narrow(CHANNELS, 0, groups)
        return Image(F.conv2d(value, kernel, None, of.stride, of.padding, of.dilation, groups))

    def scale(self, x: Image, vector: Expr) -> Image:
        """Each feature times its value."""
        require_values(x.patches)
        return Image(x.value * self.evaluate(vector).reshape(-1, 1, 1))

    def add(self, a: Image, b: Image) -> Image:
        """The sum."""
        return Image(a.value + b.value)

    def concat(self, parts: Sequence[Image]) -> Image:
        """The features of all parts, concatenated."""
        return Image(torch.cat([part.value for part in parts], CHANNELS))

    def split(self, x: Image, sizes: Sequence[int]) -> list[Image]:
        """The features, split into groups."""
        require_values(x.patches)
        return [Image(part) for part in torch.split(x.value, list(sizes), CHANNELS)]

    def first(self, x: Image, count: int) -> Image:
        """The first features."""
        require_values(x.patches)
        return Image(x.value[:, :count])

    def pad(self, x: Image, count: int) -> Image:
        """The features with zeros behind them."""
        return Image(F.pad(x.value, (0, 0, 0, 0, 0, count)))

    def generated(self, x: Image, parts: Generated) -> Image:
        """Not supported: generated kernels are materialised."""
        raise NotFactorableError
