"""Adaptive mixing (arXiv 2203.16507): each query makes the weights that mix what it sampled.

LORS stores the three large tensors of this module, 90 % of the decoder, once for all stages plus
low-rank residuals: `projection`, static, and the two generators, adaptive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from adamixer.settings import Setting


class Generator(nn.Module):
    """Makes a matrix (groups, out, in) of each query: rows ordered (group, out, in).

    The query is given a 1 as last entry, so that the weight's last column is the bias. AdaMixer
    has the same numbers as a Linear with a bias; but of a bias as a column LORS stores one for
    all stages, with a private residual, which the paper's count of parameters needs.
    """

    def __init__(self, width: int, groups: int, out: int, inputs: int) -> None:
        super().__init__()
        self.shape = (groups, out, inputs)
        self.linear = nn.Linear(width + 1, math.prod(self.shape), bias=False)

    def reset(self) -> None:
        """No dependence on the query at first: the same random matrix for all of them."""
        weight = self.linear.weight
        bound = 1 / math.sqrt(weight.shape[1] - 1)
        with torch.no_grad():
            weight[:, :-1].zero_()
            weight[:, -1].uniform_(-bound, bound)

    def forward(self, content: Tensor) -> Tensor:
        """(..., width) to (..., groups, out, in)"""
        rows: Tensor = self.linear(pad(content, (0, 1), value=1.0))
        return rows.unflatten(-1, self.shape)


def normalised(mixed: Tensor) -> Tensor:
    """ReLU of a LayerNorm over points and channels, without scale or bias."""
    return layer_norm(mixed, mixed.shape[-2:]).relu()


class Mixing(nn.Module):
    """Channel mixing, then spatial mixing, then back to the query.

    For each query and group, with the sample X of shape (in_points, channels):

        M = generated (channels, channels);  X <- ReLU(LN(X M^T))
        S = generated (out_points, in_points);  X <- ReLU(LN(S X))
        content + Linear(all groups of X, flattened)
    """

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        s = setting
        self.channel_generator = Generator(s.width, s.groups, s.channels, s.channels)
        self.spatial_generator = Generator(s.width, s.groups, s.out_points, s.in_points)
        self.projection = nn.Linear(s.mixed, s.width)

    def reset(self) -> None:
        """See `Generator.reset`."""
        self.channel_generator.reset()
        self.spatial_generator.reset()

    def forward(self, sampled: Tensor, content: Tensor) -> Tensor:
        """The next content of the queries.

        Args:
            sampled: (batch, queries, groups, in_points, channels)
            content: (batch, queries, width)

        Returns:
            (batch, queries, width)
        """
        mixed = normalised(sampled @ self.channel_generator(content).mT)
        mixed = normalised(self.spatial_generator(content) @ mixed)
        update: Tensor = self.projection(mixed.flatten(2))
        return content + update
