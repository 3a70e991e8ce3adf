"""The sizes of an AdaMixer decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Sizes of a decoder; the defaults are those of AdaMixer.

    Args:
        classes: object classes, without a background.
        stages: decoder layers, each of which refines every query.
        queries: objects that are looked for at once.
        width: numbers in a query's content vector, and channels of the features it reads.
        heads: of the self-attention between queries.
        ffn: hidden units of the feed-forward.
        groups: parts of the channels that are sampled and mixed on their own.
        in_points: points sampled for each query and group.
        out_points: rows that the spatial mixing makes of them.
        strides: of the feature maps, in pixels.
    """

    classes: int = 80
    stages: int = 6
    queries: int = 100
    width: int = 256
    heads: int = 8
    ffn: int = 2048
    groups: int = 4
    in_points: int = 32
    out_points: int = 128
    strides: tuple[int, ...] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        for name, part in (("heads", self.heads), ("groups", self.groups), ("8", 8)):
            if self.width % part:  # 8: a sine and a cosine of each of four coordinates
                raise ValueError(f"width={self.width} is no multiple of {name}={part}")

    @property
    def channels(self) -> int:
        """Channels of one group."""
        return self.width // self.groups

    @property
    def mixed(self) -> int:
        """Numbers that the mixing makes for each query."""
        return self.groups * self.out_points * self.channels


STOCK = Setting()
# Fewer and larger groups give larger generated matrices, of which a low rank is a smaller share.
LORS = Setting(groups=2, in_points=64)
SETTINGS = {"stock": STOCK, "lors": LORS}


def setting_of(name: str, **changes: Any) -> Setting:
    """A setting by name, `stock` or `lors`, with changes."""
    if "strides" in changes:
        changes["strides"] = tuple(changes["strides"])  # a list, where it comes from JSON
    return dataclasses.replace(SETTINGS[name], **changes)
