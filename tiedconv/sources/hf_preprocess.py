"""Preprocessing of images for Hugging Face models: from preprocessor_config.json or a default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiedconv.errors import PlanError, SourceError
from tiedconv.sources.arguments import JSON, image_size
from tiedconv.sources.source import IMAGENET_MEAN, IMAGENET_STD, Preprocess

_BICUBIC = 3  # Pillow's number for it, which the files hold
_DETECTORS_SIZE = 640  # that of RT-DETR and those after it


def from_image_processor(spec: str, path: Path, kwargs: Mapping[str, JSON]) -> Preprocess:
    """Reads preprocessor_config.json.

    Args:
        spec: the model, for messages.
        path: the file.
        kwargs: the model's arguments, where an image_size among them decides the size.

    Raises:
        SourceError: the file is malformed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        size, resize = _sizes(data)
        normalised = data.get("do_normalize", True)
        stated = Preprocess.from_json(
            {
                "size": size,
                "resize": resize,
                "mean": list(data.get("image_mean") or IMAGENET_MEAN) if normalised else [0.0] * 3,
                "std": list(data.get("image_std") or IMAGENET_STD) if normalised else [1.0] * 3,
                "interpolation": "bicubic" if data.get("resample") == _BICUBIC else "bilinear",
            }
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, PlanError) as error:
        raise SourceError(
            f"The preprocessor_config.json of {spec} is malformed ({error})",
            hint="Correct the file or remove it",
            code="preprocessing-malformed",
        ) from error
    return stated.scaled_to(image_size(kwargs))


def from_model_config(config: Mapping[str, JSON]) -> Preprocess | None:
    """ImageNet's usual preprocessing at the size that a model's configuration states.

    Returns:
        None for a model that takes no images, as far as its configuration shows.
    """
    size = image_size(config)
    architecture = str(config.get("architecture"))
    if size is None and architecture.endswith("ForObjectDetection"):
        return Preprocess(size=_DETECTORS_SIZE)  # the whole image: nothing is cropped away
    if size is None and architecture.endswith("ForImageClassification"):
        size = 224
    return None if size is None else Preprocess(size=224, resize=256).scaled_to(size)


def _sizes(data: Mapping[str, Any]) -> tuple[int, int | None]:
    """Side of the input and of what it is cropped from."""
    size = data.get("size", 224)
    shorter = size.get("shortest_edge") if isinstance(size, dict) else None
    side = shorter if shorter is not None else size["height"] if isinstance(size, dict) else size
    if data.get("do_center_crop"):
        crop = data.get("crop_size", side)
        return (crop["height"] if isinstance(crop, dict) else crop), side
    if data.get("crop_pct") and side < 384:
        # ConvNeXt states the final size, and resizes straight to it from 384 pixels on.
        return side, int(side / data["crop_pct"])
    if isinstance(size, dict) and size.get("longest_edge"):
        # A detector's images have many shapes. In a square of that side no object is cropped away.
        return side, None
    if shorter is not None and not data.get("crop_pct"):
        return side, side
    return side, None
