"""Boxes, in pixels of the image.

Two forms are used: corners `(x1, y1, x2, y2)`, and AdaMixer's `(x, y, z, r)`: the
centre, the base-2 logarithm of the size and that of the aspect ratio. In the latter a query is a
point of the 3D feature space, whose third axis is the logarithm of the stride. The paper measures
in units of the finest stride and takes half of our r; both shift and scale the axes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def size_of(xyzr: Tensor) -> Tensor:
    """Width and height `2^(z -+ r/2)`: (..., 4) to (..., 2)."""
    z, r = xyzr[..., 2:3], xyzr[..., 3:4]
    return torch.exp2(torch.cat([z - r / 2, z + r / 2], -1))


def corners_of(xyzr: Tensor) -> Tensor:
    """`(x, y, z, r)` to corners, both (..., 4)."""
    half = size_of(xyzr) / 2
    return torch.cat([xyzr[..., :2] - half, xyzr[..., :2] + half], -1)


def xyzr_of(corners: Tensor) -> Tensor:
    """Corners to `(x, y, z, r)`, both (..., 4); width and height must be positive."""
    low, high = corners[..., :2], corners[..., 2:]
    width, height = torch.log2(high - low).unbind(-1)
    z, r = (width + height) / 2, height - width
    return torch.cat([(low + high) / 2, torch.stack([z, r], -1)], -1)


def refine(xyzr: Tensor, delta: Tensor) -> Tensor:
    """The box moved by a delta: the centre in units of its size, z and r by addition."""
    centre = xyzr[..., :2] + delta[..., :2] * torch.exp2(xyzr[..., 2:3])
    return torch.cat([centre, xyzr[..., 2:] + delta[..., 2:]], -1)


def area(corners: Tensor) -> Tensor:
    """Areas, (..., 4) to (...); 0 for a box that is turned inside out."""
    sides = (corners[..., 2:] - corners[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area of the overlap of boxes, whose shapes broadcast: (..., 4) and (..., 4) to (...)."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    return area(torch.cat([low, high], -1))


def iof(corners: Tensor) -> Tensor:
    """Share of box i that box j covers: (..., n, 4) to (..., n, n)."""
    first, second = corners.unsqueeze(-2), corners.unsqueeze(-3)
    return intersection(first, second) / area(first).clamp(min=1e-6)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019), in (-1, 1]; shapes broadcast."""
    shared = intersection(a, b)
    union = (area(a) + area(b) - shared).clamp(min=1e-6)
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = area(torch.cat([low, high], -1)).clamp(min=1e-6)
    return shared / union - (hull - union) / hull
