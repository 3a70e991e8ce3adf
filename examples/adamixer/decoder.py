"""The decoder of AdaMixer: queries that look, mix, and move their boxes, stage after stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adamixer.boxes import corners_of, iof, refine, xyzr_of
from adamixer.mixing import Mixing
from adamixer.sampling import Sampler
from adamixer.settings import Setting, setting_of

PRIOR = 0.01  # probability of an object at first, as the focal loss wants it (Lin et al., 2017)


def position_encoding(xyzr: Tensor, width: int) -> Tensor:
    """Sines and cosines of a box: (..., 4) to (..., width); no parameters.

    The usual wavelengths, from 2 pi to 20,000 pi; x and y are taken in thousands of pixels.
    """
    count = width // 8  # frequencies of each of the four coordinates
    steps = torch.arange(count, device=xyzr.device, dtype=xyzr.dtype)
    frequencies = 10_000.0 ** (-steps / count)
    units = xyzr.new_tensor([1e-3, 1e-3, 1.0, 1.0])
    angles = (xyzr * units).unsqueeze(-1) * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


class Attention(nn.Module):
    """Self-attention between queries, which also sees how their boxes overlap.

    Head h adds `alpha_h log(IoF_ij + 1e-7)` to its logits, where IoF_ij is the share of box i
    that box j covers.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.alpha = nn.Parameter(torch.empty(heads))

    def forward(self, content: Tensor, xyzr: Tensor) -> Tensor:
        """(batch, queries, width) and (batch, queries, 4) to (batch, queries, width)"""
        overlap = torch.log(iof(corners_of(xyzr)) + 1e-7)
        bias = (overlap.unsqueeze(1) * self.alpha[:, None, None]).flatten(0, 1)
        x = content + position_encoding(xyzr, content.shape[-1])
        found: Tensor = self.attention(x, x, x, attn_mask=bias, need_weights=False)[0]
        return x + found


class Branch(nn.Module):
    """Linear, LayerNorm, ReLU, Linear: from a query to its classes or its box."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def forward(self, content: Tensor) -> Tensor:
        found: Tensor = self.output(self.norm(self.hidden(content)).relu())
        return found


class Stage(nn.Module):
    """One decoder layer."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        width = setting.width
        self.attention = Attention(width, setting.heads)
        self.attention_norm = nn.LayerNorm(width)
        self.sampler = Sampler(setting)
        self.mixing = Mixing(setting)
        self.mixing_norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, setting.ffn), nn.ReLU(), nn.Linear(setting.ffn, width)
        )
        self.ffn_norm = nn.LayerNorm(width)
        self.classes = Branch(width, setting.classes)
        self.box = Branch(width, 4)

    def reset(self) -> None:
        """Initial values: no box moves, and every class is improbable."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        nn.init.constant_(self.classes.output.bias, -math.log(1 / PRIOR - 1))
        nn.init.zeros_(self.box.output.weight)
        nn.init.zeros_(self.box.output.bias)
        nn.init.uniform_(self.attention.alpha, 0, 4)  # from heads that look anywhere to near ones
        self.sampler.reset()
        self.mixing.reset()

    def forward(
        self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Class logits, the content and the boxes `(x, y, z, r)` of the queries after it."""
        content = self.attention_norm(self.attention(content, xyzr))
        sampled = self.sampler(maps, content, xyzr)
        content = self.mixing_norm(self.mixing(sampled, content))
        content = self.ffn_norm(content + self.ffn(content))
        return self.classes(content), content, refine(xyzr, self.box(content))


class Decoder(nn.Module):
    """The stages."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting = setting
        self.stages = nn.ModuleList(Stage(setting) for _ in range(setting.stages))
        for stage in self.stages:
            stage.reset()

    def forward(
        self, maps: Sequence[Tensor], content: Tensor, xyzr: Tensor
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """What each stage finds.

        Args:
            maps: for each stride a feature map (batch, width, image height / stride, ...).
            content: of the queries at first, (batch, queries, width).
            xyzr: their boxes at first, (batch, queries, 4).

        Returns:
            class logits (stages, batch, queries, classes) and boxes as corners in pixels
            (stages, batch, queries, 4).
        """
        logits, boxes = [], []
        for stage in self.stages:
            found, content, xyzr = stage(maps, content, xyzr)
            logits.append(found)
            boxes.append(corners_of(xyzr))
            # Each stage answers for its own move alone, as usual in iterative refinement.
            xyzr = xyzr.detach()
        return torch.stack(logits), torch.stack(boxes)


class Queries(nn.Module):
    """Where all starts: a learned content for each query, and a box over the whole image."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.randn(setting.queries, setting.width))

    def forward(self, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Contents (batch, queries, width) and boxes (batch, queries, 4)."""
        whole = xyzr_of(self.content.new_tensor([0.0, 0.0, width, height]))
        count = len(self.content)
        return self.content.expand(batch, -1, -1), whole.expand(batch, count, -1)


def decoder(setting: str = "stock", **changes: Any) -> Decoder:
    """A decoder with the sizes of AdaMixer (`stock`) or those used with LORS (`lors`)."""
    return Decoder(setting_of(setting, **changes))
