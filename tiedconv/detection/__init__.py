"""Object detectors: outputs, losses, training, and COCO's average precision.

A detector here is a module that takes images (B, 3, H, W) and returns an object with `logits`
(B, Q, classes) and `pred_boxes` (B, Q, 4), centre and size relative to the image, as those of
transformers do. Called with `labels` as well it returns a `loss`.
"""

from __future__ import annotations

from tiedconv.detection.classes import class_map
from tiedconv.detection.lists import DetectionList
from tiedconv.detection.losses import detection_distillation_loss
from tiedconv.detection.objective import DetectionObjective
from tiedconv.detection.outputs import (
    Detections,
    detections_of,
    generalised_iou,
    tensor_in,
)
from tiedconv.detection.scoring import PRECISION, average_precision
from tiedconv.detection.task import (
    TASKS,
    Detection,
    detects,
    for_detector,
)

__all__ = [
    "PRECISION",
    "TASKS",
    "Detection",
    "DetectionList",
    "DetectionObjective",
    "Detections",
    "average_precision",
    "class_map",
    "detection_distillation_loss",
    "detections_of",
    "detects",
    "for_detector",
    "generalised_iou",
    "tensor_in",
]
