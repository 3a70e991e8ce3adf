"""The verb `transform`: the preprocessing of a model's images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tiedconv.data.transforms import ImageTransform, eval_transform
from tiedconv.errors import UserError
from tiedconv.io.checkpoint_reader import read
from tiedconv.runtime.tie import is_tied, state_of
from tiedconv.sources import Preprocess, Source
from tiedconv.sources.in_memory import source_in_memory
from tiedconv.sources.models import is_compact, open_model, source_of
from tiedconv.sources.repository import local


def transform(
    model: str | Path | nn.Module, *, model_args: Mapping[str, Any] | None = None
) -> ImageTransform:
    """How images become inputs of a model, as they were for its conversion.

    Args:
        model: a model, tied or as its library built it, a compact file, or a model spec.
        model_args: arguments of the model's constructor, for a spec.

    Returns:
        a callable from a PIL image to a tensor `(C, H, W)`, to be used as torchvision's are.

    Raises:
        UserError: nothing says how its images are prepared (`preprocess-unknown`).
    """
    if isinstance(model, nn.Module):
        source = _source_of(model)
        wanted = None if source is None else source.preprocess
    elif is_compact(path := local(model)):
        wanted = _recorded(read(path).source)
    else:
        wanted = open_model(model, weights=None, model_args=model_args).source.preprocess
    if wanted is None:
        raise UserError(
            "Nothing says how the images of this model are prepared",
            "Prepared in another way they would give worse answers",
            "Give the spec that it was made from, such as resnet50 or timm:NAME",
            code="preprocess-unknown",
        )
    return eval_transform(wanted)


def _source_of(model: nn.Module) -> Source | None:
    """Where a model in memory came from, tied or not."""
    if not is_tied(model):
        return source_in_memory(model)
    record = state_of(model).source
    return None if record is None else source_of(record)


def _recorded(source: Mapping[str, Any] | None) -> Preprocess | None:
    return None if source is None else source_of(source).preprocess
