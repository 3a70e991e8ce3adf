"""A few photos with boxes in COCO's form, and average precision on them."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from adamixer.losses import Objects

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
    data = json.loads(annotations.read_text("utf-8"))
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in data["annotations"]:
        found[annotation["image_id"]].append(annotation)
    photos: list[Photo] = []
    for entry in sorted(data["images"], key=lambda e: int(e["id"])):
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


def detections(
    number: int, logits: Tensor, boxes: Tensor, most: int = 100
) -> list[dict[str, Any]]:  # fmt: skip
    """The best answers of one image, in COCO's form: logits (queries, classes), corners."""
    scores, places = logits.sigmoid().flatten().topk(min(most, logits.numel()))
    queries, labels = places // logits.shape[1], places % logits.shape[1]
    corners = boxes[queries]
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    return [
        {"image_id": number, "category_id": int(c), "bbox": b, "score": float(s)}
        for c, b, s in zip(labels, sides.tolist(), scores, strict=True)
    ]


def average_precision(
    photos: list[Photo], logits: Tensor, boxes: Tensor
) -> tuple[float, float]:  # fmt: skip
    """COCO's AP (of IoU 0.50 to 0.95) and AP50, over the classes that the photos show.

    Args:
        photos: with their objects.
        logits: of the last stage, (photos, queries, classes).
        boxes: corners in pixels, (photos, queries, 4).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    answers = [
        d for p, scores, found in zip(photos, logits, boxes, strict=True)
        for d in detections(p.number, scores, found)
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it reports each step
        truth = COCO()
        truth.dataset = _dataset(photos, logits.shape[-1])
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def _dataset(photos: list[Photo], classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for photo in photos:
        for label, box in zip(photo.objects.labels, photo.objects.boxes, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": photo.number, "iscrowd": 0,
                    "category_id": int(label), "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                }
            )  # fmt: skip
    return {
        "info": {},  # loadRes reads it
        "images": [{"id": photo.number} for photo in photos],
        "categories": [{"id": c} for c in range(classes)],
        "annotations": annotations,
    }
