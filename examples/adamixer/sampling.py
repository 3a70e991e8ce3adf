"""Adaptive 3D sampling (arXiv 2203.16507): each query chooses points in (x, y, log2 stride)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from adamixer.boxes import size_of
from adamixer.settings import Setting

TAU = 2.0  # softness of the choice of feature maps, as in the paper


def level_weights(z: Tensor, strides: Sequence[int]) -> Tensor:
    """How much each feature map counts at a height: (...) to (..., levels).

    A Gaussian in `z - log2(stride)`, made to sum to 1.
    """
    levels = z.new_tensor([math.log2(s) for s in strides])
    return torch.softmax(-(z.unsqueeze(-1) - levels).square() / TAU, -1)


def sample_map(values: Tensor, points: Tensor, stride: int) -> Tensor:
    """Bilinear values of one feature map; zero outside of the image.

    Args:
        values: (batch, groups * channels, height, width); cell (i, j) covers the pixels from
            (j, i) * stride to (j + 1, i + 1) * stride.
        points: (batch, queries, groups, points, 2), x and y in pixels.
        stride: pixels of a cell.

    Returns:
        (batch, queries, groups, points, channels)
    """
    batch, _, groups = points.shape[:3]
    height, width = values.shape[-2:]
    extent = points.new_tensor([width * stride, height * stride])
    grid = (2 * points / extent - 1).transpose(1, 2).flatten(0, 1)
    parts = values.unflatten(1, (groups, -1)).flatten(0, 1)
    found = grid_sample(parts, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return found.unflatten(0, (batch, groups)).permute(0, 3, 1, 4, 2)


def sample_3d(maps: Sequence[Tensor], points: Tensor, strides: Sequence[int]) -> Tensor:
    """Values of the 3D feature space.

    Args:
        maps: one feature map for each stride, all of the same channels.
        points: (batch, queries, groups, points, 3): x, y in pixels, z as log2 of a stride.
        strides: of the maps.

    Returns:
        (batch, queries, groups, points, channels of a group)
    """
    weights = level_weights(points[..., 2], strides).unbind(-1)
    total = torch.zeros((), dtype=points.dtype, device=points.device)
    for values, weight, stride in zip(maps, weights, strides, strict=True):
        total = total + weight.unsqueeze(-1) * sample_map(values, points[..., :2], stride)
    return total


class Sampler(nn.Module):
    """Points of each query, from its content, and the features there."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.strides = setting.strides
        self.shape = (setting.groups, setting.in_points, 3)
        self.offsets = nn.Linear(setting.width, math.prod(self.shape))

    def reset(self) -> None:
        """At first the points are spread over the inner half of the box, one octave finer."""
        nn.init.zeros_(self.offsets.weight)
        nn.init.uniform_(self.offsets.bias, -0.5, 0.5)
        with torch.no_grad():
            self.offsets.bias.view(self.shape)[..., 2].fill_(-1)

    def points(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """Where the queries look.

        Args:
            content: (batch, queries, width)
            xyzr: (batch, queries, 4)

        Returns:
            (batch, queries, groups, points, 3): offsets in x and y are in units of the box.
        """
        offsets = self.offsets(content).unflatten(-1, self.shape)
        box = xyzr[:, :, None, None]
        place = box[..., :2] + offsets[..., :2] * size_of(box)
        return torch.cat([place, box[..., 2:3] + offsets[..., 2:]], -1)

    def forward(self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor) -> Tensor:
        """(batch, queries, groups, points, channels)"""
        return sample_3d(maps, self.points(content, xyzr), self.strides)
