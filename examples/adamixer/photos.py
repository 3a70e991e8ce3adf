"""A few photos with boxes in COCO's form, and average precision on them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import pad

from adamixer.losses import Objects
from tiedconv import data
from tiedconv.detection import average_precision as tiedconv_precision
from tiedconv.detection import detections_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision wants


@dataclass(frozen=True)
class Photo:
    """One photo, scaled so that its longer side is `size`, and padded to a square.

    Args:
        number: COCO's number of the image.
        image: normalised, (3, size, size).
        objects: boxes in pixels of the scaled photo.
    """

    number: int
    image: Tensor
    objects: Objects


def load_photos(folder: Path, annotations: Path, count: int, size: int = 256) -> list[Photo]:
    """The first photos by number with 2 to 4 objects, none below 1/16 of the longer side.

    Args:
        folder: with the image files.
        annotations: a COCO file of them, whose category numbers are 0, 1, ...
        count: how many.
        size: of the square.
    """
    listed = json.loads(annotations.read_text("utf-8"))
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in listed["annotations"]:
        found[annotation["image_id"]].append(annotation)
    photos: list[Photo] = []
    for entry in sorted(listed["images"], key=lambda e: int(e["id"])):
        mine = found[entry["id"]]
        least = max(entry["width"], entry["height"]) / 16
        if 2 <= len(mine) <= 4 and all(min(a["bbox"][2:]) >= least for a in mine):
            photos.append(_photo(folder / entry["file_name"], entry["id"], mine, size))
        if len(photos) == count:
            return photos
    raise ValueError(f"{annotations} has {len(photos)} such photos, not {count}")


def _photo(path: Path, number: int, annotations: list[dict[str, Any]], size: int) -> Photo:
    with Image.open(path) as file:
        scale = size / max(file.size)
        width, height = (round(side * scale) for side in file.size)
        pixels = np.asarray(file.convert("RGB").resize((width, height)), dtype=np.float32)
    image = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    image = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    corners = torch.tensor([a["bbox"] for a in annotations]) * scale
    corners[:, 2:] += corners[:, :2]
    labels = torch.tensor([a["category_id"] for a in annotations])
    square = pad(image, (0, size - width, 0, size - height))
    return Photo(number, square, Objects(labels, corners, (size, size)))


def average_precision(photos: list[Photo], logits: Tensor, boxes: Tensor) -> tuple[float, float]:
    """COCO's AP (of IoU 0.50 to 0.95) and AP50, over the classes that the photos show.

    Args:
        photos: with their objects.
        logits: of the last stage, (photos, queries, classes).
        boxes: corners in pixels, (photos, queries, 4).
    """
    width, height = photos[0].objects.size
    shares = boxes / torch.tensor([width, height, width, height])
    middles = torch.cat(
        [(shares[..., :2] + shares[..., 2:]) / 2, shares[..., 2:] - shares[..., :2]], -1
    )
    answers = detections_of({"logits": logits, "pred_boxes": middles}, nn.Identity())
    classes = range(logits.shape[-1])
    score = tiedconv_precision(dict(enumerate(answers)), _as_data(photos, len(classes)), classes)
    return score["ap"], score["ap50"]


def _as_data(photos: list[Photo], classes: int) -> data.Objects:
    corners = torch.cat([p.objects.boxes for p in photos])
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).double().numpy()
    counts = [len(p.objects.labels) for p in photos]
    return data.Objects(
        starts=np.cumsum([0, *counts]),
        boxes=sides,
        classes=torch.cat([p.objects.labels for p in photos]).numpy(),
        areas=sides[:, 2] * sides[:, 3],
        iscrowd=np.zeros(len(sides), np.int64),
        sizes=np.array([p.objects.size for p in photos]),
        names=tuple(map(str, range(classes))),
        category_ids=tuple(range(classes)),
    )
