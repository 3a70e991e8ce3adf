"""A tiny one-stage detector of the shape that YOLO networks have had since version 5.

Stages of split-and-concatenate (CSP) blocks, a pyramid that goes up and down again, and one map of
boxes and classes for each of three scales. Layers are numbered; each convolution is `conv` beside
its batch norm `bn`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Module):
    """A convolution, a batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3 x 3 convolutions around which the input goes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width, 3), Conv(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.cv2(self.cv1(x))
        return out


class Csp(nn.Module):
    """Half of the channels goes through bottlenecks, and all stages are concatenated."""

    def __init__(self, inputs: int, outputs: int, depth: int) -> None:
        super().__init__()
        half = outputs // 2
        self.cv1 = Conv(inputs, 2 * half)
        self.cv2 = Conv((2 + depth) * half, outputs)
        self.m = nn.ModuleList(Bottleneck(half) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        for block in self.m:
            parts.append(block(parts[-1]))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class Pooled(nn.Module):
    """Three max pools one after another, concatenated (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        out: Tensor = self.cv2(torch.cat(parts, 1))
        return out


class OneStage(nn.Module):
    """Images `(n, 3, 64, 64)` to three maps `(n, 4 + classes, side, side)`, sides 8, 4 and 2."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        w = width
        self.backbone = nn.Sequential(
            Conv(3, w, 3, 2), Conv(w, w, 3, 2), Csp(w, w, 2), Conv(w, 2 * w, 3, 2),
            Csp(2 * w, 2 * w, 2), Conv(2 * w, 2 * w, 3, 2), Csp(2 * w, 2 * w, 1),
            Conv(2 * w, 4 * w, 3, 2), Csp(4 * w, 4 * w, 1), Pooled(4 * w),
        )  # fmt: skip
        self.up = nn.ModuleList([Csp(6 * w, 2 * w, 1), Csp(4 * w, 2 * w, 1)])
        self.down = nn.ModuleList([Csp(4 * w, 2 * w, 1), Csp(6 * w, 4 * w, 1)])
        self.step = nn.ModuleList(Conv(2 * w, 2 * w, 3, 2) for _ in range(2))
        self.heads = nn.ModuleList(
            nn.Sequential(Conv(n, 2 * w, 3), nn.Conv2d(2 * w, 4 + classes, 1))
            for n in (2 * w, 2 * w, 4 * w)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        x = images
        for number, layer in enumerate(self.backbone):
            x = layer(x)
            if number in (4, 6, 9):
                kept.append(x)
        fine, middle, coarse = kept
        middle = self.up[0](torch.cat([_twice(coarse), middle], 1))
        fine = self.up[1](torch.cat([_twice(middle), fine], 1))
        middle = self.down[0](torch.cat([self.step[0](fine), middle], 1))
        coarse = self.down[1](torch.cat([self.step[1](middle), coarse], 1))
        return [head(x) for head, x in zip(self.heads, (fine, middle, coarse), strict=True)]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def one_stage() -> nn.Module:
    """With weights that a seed draws, and batch norms that have seen images."""
    torch.manual_seed(0)
    model = OneStage()
    with torch.no_grad():
        for _ in range(20):
            model(torch.rand(8, 3, 64, 64))
    return model.eval()
