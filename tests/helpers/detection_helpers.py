"""A tiny detector, and a folder of photos with coloured boxes in COCO's form."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 32
NAMES = ("red", "blue")
QUERIES = 6


class TinyDetector(nn.Module):
    """Patches, a stack of decoder layers over learned queries, and two heads."""

    num_labels = len(NAMES)

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.place = nn.Parameter(torch.randn((SIDE // 8) ** 2, width))
        self.norm = nn.BatchNorm2d(width)
        self.queries = nn.Parameter(torch.randn(QUERIES, width))
        layer = nn.TransformerDecoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, depth)
        for matrix in (p for p in self.decoder.parameters() if p.ndim > 1):
            nn.init.xavier_uniform_(matrix)  # PyTorch copies one layer: it is free to tie
        self.class_head = nn.Linear(width, len(NAMES))
        self.box_head = nn.Linear(width, 4)

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]] | None = None) -> Any:
        memory = self.norm(self.patches(pixel_values)).flatten(2).transpose(1, 2) + self.place
        found = self.decoder(self.queries.expand(len(memory), -1, -1), memory)
        output = SimpleNamespace(
            logits=self.class_head(found), pred_boxes=self.box_head(found).sigmoid()
        )
        if labels is not None:
            self.seen = labels
            output.loss = output.logits.square().mean() + sum(
                (output.pred_boxes[i, : len(label["boxes"])] - label["boxes"]).abs().sum()
                for i, label in enumerate(labels)
            )
        return output


def tiny_detector() -> TinyDetector:
    """The detector with the same weights each time."""
    torch.manual_seed(0)
    return TinyDetector()


tiny_detector.preprocess = {  # type: ignore[attr-defined]
    "size": SIDE, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"
}  # fmt: skip


def write_coco(root: Path, train: int = 6, val: int = 4, sparse: bool = False) -> Path:
    """A folder with `instances_<part>2017.json` and `images/<part>2017/`."""
    generator = np.random.default_rng(0)
    numbers = [3, 90] if sparse else [0, 1]
    for part, count in (("train2017", train), ("val2017", val)):
        folder = root / "images" / part
        folder.mkdir(parents=True)
        images, marks = [], []
        for i in range(count):
            pixels = generator.integers(0, 60, (40, 50, 3), np.uint8)
            for kind in range(1 + i % 2):
                left, top = (int(n) for n in generator.integers(0, 25, 2))
                pixels[top : top + 12, left : left + 16, 2 * kind] = 250
                marks.append(
                    {
                        "id": len(marks), "image_id": 100 + i, "category_id": numbers[kind],
                        "bbox": [left, top, 16, 12], "area": 192.0, "iscrowd": 0,
                    }
                )  # fmt: skip
            Image.fromarray(pixels).save(folder / f"{i}.png")
            images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 50, "height": 40})
        categories = [{"id": n, "name": name} for n, name in zip(numbers, NAMES, strict=True)]
        content = {"images": images, "annotations": marks, "categories": categories}
        (root / f"instances_{part}.json").write_text(json.dumps(content))
    return root
