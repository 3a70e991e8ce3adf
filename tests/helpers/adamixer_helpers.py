"""A tiny AdaMixer and what it is to find, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from adamixer import losses, settings
from adamixer.conversion import recipe_for
from adamixer.detector import Head
from torch import Tensor

import tiedconv

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY: dict[str, Any] = {
    "classes": 3, "stages": 3, "queries": 6, "width": 16, "heads": 2, "ffn": 24,
    "groups": 2, "in_points": 4, "out_points": 6,
}  # fmt: skip
SETTING = settings.setting_of("lors", **TINY)
CHANNELS = (5, 6, 7, 8)


def tiny_head() -> Head:
    torch.manual_seed(0)
    return Head(CHANNELS, SETTING)


def tiny_maps(batch: int = 2, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, c, size // s, size // s, generator=generator)
        for c, s in zip(CHANNELS, SETTING.strides, strict=True)
    ]


def tiny_objects() -> list[losses.Objects]:
    first = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 50.0]])
    return [
        losses.Objects(torch.tensor([0, 2]), first, (64, 64)),
        losses.Objects(torch.tensor([1]), first[1:] - 8, (64, 64)),
    ]


def tiny_lors() -> Any:
    return tiedconv.convert(tiny_head(), recipe=recipe_for(SETTING, scratch=True))
