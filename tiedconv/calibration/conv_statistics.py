"""What a convolution's matrix reads at each place, and the gradients of its weight by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, unfold

_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class ConvGeometry:
    """How a 2-D convolution, not a transposed one, moves over its input.

    A single number stands for both directions, as torch writes a padding of "valid".
    """

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "padding", "dilation"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value * 2 if len(value) == 1 else value)


def patches(x: Tensor, how: ConvGeometry) -> Tensor:
    """What each group of a convolution reads, `(images * groups, in / groups * kh * kw, places)`.

    Args:
        x: its input `(images, in, height, width)`.
        how: its geometry.
    """
    if tuple(how.kernel) == (1, 1) and tuple(how.padding) == (0, 0):
        columns = x[:, :, :: how.stride[0], :: how.stride[1]].flatten(2)
    else:
        columns = unfold(
            x, tuple(how.kernel), tuple(how.dilation), tuple(how.padding), tuple(how.stride)
        )
    return columns.reshape(len(x) * how.groups, -1, columns.shape[-1])


def patches_at(x: Tensor, how: ConvGeometry, which: Tensor, width: int) -> Tensor:
    """A few of the patches, `(images * n, in / groups * kh * kw)`, without the others.

    Args:
        x: the input `(images, in, height, width)`.
        how: the geometry.
        which: indices of patches of an image, whose groups lie side by side at each place.
        width: places in a row of the output.
    """
    places, group = which // how.groups, which % how.groups
    starts = places // width * how.stride[0], places % width * how.stride[1]
    lines, columns = (
        start[:, None] + how.dilation[i] * torch.arange(how.kernel[i], device=x.device)
        for i, start in enumerate(starts)
    )
    each = x.shape[1] // how.groups
    channels = group[:, None] * each + torch.arange(each, device=x.device)
    padded = pad(x, (how.padding[1], how.padding[1], how.padding[0], how.padding[0]))
    at = channels[:, :, None, None], lines[:, None, :, None], columns[:, None, None, :]
    return padded[:, *at].flatten(0, 1).flatten(1)


def gradient_energy(gradient: Tensor, x: Tensor, how: ConvGeometry) -> Tensor:
    """The squared norms of the weight's gradients of single images, summed over the images.

    With few places, Gram matrices over these give the norm without the gradient itself:
    `|sum_p g_p a_p^T|^2 = sum_pq (g_p . g_q) (a_p . a_q)`. With many, a convolution that has each
    image as a group of its own gives all gradients at once.

    Args:
        gradient: of the loss by the output, `(images, out, height, width)`.
        x: the input `(images, in, height, width)`.
        how: the geometry.

    Returns:
        a scalar in float64.
    """
    images, out, *size = gradient.shape
    places, rows = size[0] * size[1], out // how.groups
    columns = x.shape[1] // how.groups * how.kernel[0] * how.kernel[1]
    if places * (rows + columns) < rows * columns:
        read, written = patches(x, how), gradient.reshape(images * how.groups, rows, places)
        return (torch.bmm(written.mT, written).double() * torch.bmm(read.mT, read)).sum()
    every = images * how.groups
    weight = x.new_zeros(()).expand(images * out, x.shape[1] // how.groups, *how.kernel)
    side_by_side = [t.reshape(1, -1, *t.shape[2:]) for t in (gradient, x)]
    of_weights: Tensor = _backward(
        *side_by_side, weight, [0], how.stride, how.padding, how.dilation, False, [0, 0], every,
        [False, True, False],
    )[1]  # fmt: skip
    return of_weights.double().square().sum()
