"""COCO's average precision, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiedconv.data import Objects
from tiedconv.detection.outputs import Detections, corners
from tiedconv.errors import MissingExtra

PRECISION = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""COCO's metrics: average precision over the IoU thresholds 0.50, 0.55, ..., 0.95; at 0.50; at
0.75; and the first for objects below 32^2, up to 96^2, and above, in pixels."""


def average_precision(
    found: Mapping[int, Detections], objects: Objects, classes: Sequence[int]
) -> dict[str, float]:
    """COCO's average precision of detections: `PRECISION`, from 0 to 1; NaN without any object.

    Args:
        found: what was found in each image, by its number in `objects`; images that are not
            named don't count.
        objects: what there is.
        classes: the model's class for each class of the data.

    Raises:
        MissingExtra: pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise MissingExtra.of("pycocotools", "detection", "The score of a detector") from error
    with contextlib.redirect_stdout(io.StringIO()):  # it tells how it goes on
        truth = COCO()
        truth.dataset = _truth(sorted(found), objects)
        truth.createIndex()
        results = _results(found, objects, {label: i for i, label in enumerate(classes)})
        if not results:
            results = [{"image_id": min(found), "category_id": 0, "bbox": [0.0] * 4, "score": 0.0}]
        scored = COCOeval(truth, truth.loadRes(results), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    values = (float(value) if value >= 0 else math.nan for value in scored.stats[:6])
    return dict(zip(PRECISION, values, strict=True))


def _truth(images: Sequence[int], objects: Objects) -> dict[str, Any]:
    annotations = [
        {
            "id": int(at) + 1,  # an annotation with the number 0 would count as not found
            "image_id": image,
            "category_id": int(objects.classes[at]),
            "bbox": objects.boxes[at].tolist(),
            "area": float(objects.areas[at]),
            "iscrowd": int(objects.iscrowd[at]),
        }
        for image in images
        for at in range(*objects.of(image).indices(len(objects)))
    ]
    return {
        "info": {},
        "images": [
            {"id": i, "width": int(objects.sizes[i, 0]), "height": int(objects.sizes[i, 1])}
            for i in images
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(objects.names)],
        "annotations": annotations,
    }


def _results(
    found: Mapping[int, Detections], objects: Objects, class_of: Mapping[int, int]
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for image, detections in found.items():
        scale = np.tile(objects.sizes[image], 2)
        boxes = corners(detections.boxes).double().numpy() * scale
        boxes[:, 2:] -= boxes[:, :2]
        for score, label, box in zip(
            detections.scores.tolist(), detections.labels.tolist(), boxes.tolist(), strict=True
        ):
            if label in class_of:  # else a class that the data don't have
                results.append(
                    {"image_id": image, "category_id": class_of[label], "bbox": box, "score": score}
                )
    return results
