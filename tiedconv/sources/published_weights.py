"""Which of several published weights: a member of torchvision's weights enums, by its name.

torchvision publishes several weights for one architecture, such as
`ResNet50_Weights.IMAGENET1K_V1`. A spec names them after a point, as timm's do:
`resnet50.IMAGENET1K_V1`. Then whatever reads the spec later, on another machine too, means the
same weights, classes and preprocessing.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from tiedconv.errors import SourceError, UserError
from tiedconv.sources.python_function import is_function_spec
from tiedconv.sources.source import Preprocess

Weights: TypeAlias = str | Path | enum.Enum
"""`default`, `none`, a path, or published weights of torchvision: a member of an enum, or its
name."""

_MEMBER = re.compile(r"(?:(\w+_Weights)\.)?([A-Z][A-Z0-9_]*)")


def with_weights_named(spec: str, weights: Weights) -> tuple[str, str | Path]:
    """A spec that names published weights, where these are asked for, and `default`.

    Args:
        spec: the model.
        weights: see `Weights`.

    Returns:
        the spec and the weights to open. A path stays one; so does a text that is a file's name.

    Raises:
        SourceError: weights of another model (`weights-of-another-model`), or there are none of
            that name (`unknown-weights`).
    """
    if isinstance(weights, enum.Enum):
        enumeration, member = type(weights).__name__, weights.name
    else:
        found = _MEMBER.fullmatch(str(weights))
        if found is None or ":" in spec or is_function_spec(spec) or Path(weights).exists():
            return spec, weights
        enumeration, member = found[1] or "", found[2]
    name = spec.partition(".")[0]
    known = published(name)
    if known is None or (enumeration and enumeration != known.__name__):
        raise SourceError(
            f"{enumeration or member} are not weights of {spec}",
            "The model can't be opened with them",
            "Name the model that they belong to, or leave them out for the default ones",
            code="weights-of-another-model",
        )
    return f"{name}.{require_member(name, member).name}", "default"


def published(name: str) -> Any:
    """The weights enum of a torchvision model; None if there is no such model."""
    from tiedconv.sources.torchvision_compat import import_torchvision

    models: Any = import_torchvision().models
    return models.get_model_weights(name) if name in models.list_models() else None


def require_member(name: str, member: str) -> Any:
    """The published weights of a torchvision model by their name.

    Raises:
        SourceError: there are none of that name (`unknown-weights`).
    """
    known = published(name).__members__
    if member not in known:
        raise SourceError(
            f"torchvision has no weights {member} for {name}",
            "There is nothing to load",
            f"Choose {' or '.join(w.name for w in published(name)) or '--weights FILE'}",
            code="unknown-weights",
        )
    return known[member]


def preprocess_change(given: Any) -> Callable[[Preprocess], Preprocess]:
    """What replaces a model's preprocessing by another.

    Args:
        given: a `Preprocess`, or torchvision's transforms of an image classifier.

    Raises:
        UserError: it is neither (`preprocess-not-known`).
    """
    wanted = given if isinstance(given, Preprocess) else preprocess_of(given)
    if wanted is None:
        raise UserError(
            f"What a {type(given).__name__} does to images can't be written into a file",
            "Nobody who loads the file would know how to prepare them",
            "Give the transforms of torchvision's weights, or a tiedconv.sources.Preprocess; any "
            "other transform belongs into the data set of calib",
            code="preprocess-not-known",
        )
    return lambda _: wanted


def preprocess_of(transforms: Any) -> Preprocess | None:
    """What torchvision's transforms of an image classifier do; None for any others.

    Args:
        transforms: such as `ResNet50_Weights.DEFAULT.transforms()`.
    """
    if type(transforms).__name__ != "ImageClassification":
        return None
    mode = str(transforms.interpolation.value)
    return Preprocess(
        size=int(transforms.crop_size[0]),
        resize=int(transforms.resize_size[0]),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=mode if mode == "bicubic" else "bilinear",
    )
