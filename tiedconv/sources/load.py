"""From a file back to a model."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

import tiedconv.sources as sources
from tiedconv.errors import CheckpointError
from tiedconv.io.checkpoint import Checkpoint, install, read
from tiedconv.io.safetensors_file import SafetensorsFile
from tiedconv.runtime.forward_check import check_size
from tiedconv.sources import Preprocess, Source
from tiedconv.sources.size_guard import bounded


def load(
    path: str | Path, *, model: nn.Module | None = None, trust_code: bool = False
) -> nn.Module:  # fmt: skip
    """The tied model of a file, in evaluation mode on the CPU.

    Args:
        path: a file that tiedconv wrote.
        model: an instance of the original class to load into (its weights are replaced), needed
            when the file was made from a model in memory.
        trust_code: allow the file to name a `package.module:function` that builds the model.

    Raises:
        CheckpointError: missing, damaged, or for another model.
        SourceError: the model's class can't be built here.
    """
    checkpoint = read(path)
    if model is None:
        model = skeleton_of(checkpoint, trust_code=trust_code)
    return widened(install(checkpoint, model), checkpoint)


def widened(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    """Numbers stored in half precision to save bytes compute in what the file says."""
    narrowed = any(step.get("computes_in") == "float32" for step in checkpoint.history)
    return model.float() if narrowed else model


def skeleton_of(checkpoint: Checkpoint, *, trust_code: bool = False) -> nn.Module:
    """A model of the class that a file was made from, with no weights of meaning."""
    source = source_of(checkpoint.source)
    plan = checkpoint.plan
    shapes = [*plan.kept.values(), *(expr.shape for expr in plan.weights.values())]
    with bounded(sum(map(math.prod, shapes)), len(shapes)):
        return sources.skeleton(source, trust_code=trust_code)


def source_of(record: Mapping[str, Any] | None) -> Source:
    """The source that a file or a tied model records."""
    if record is None:
        raise CheckpointError(
            "The file does not say what model it was made from",
            "Its class can't be built",
            "Load it in Python: tiedconv.load(path, model=an_instance)",
        )
    return Source.from_json(record)


def with_preprocess(source: Source, change: Callable[[Preprocess], Preprocess] | None) -> Source:
    """The source with another way to prepare images, as the user asks."""
    if change is None:
        return source
    return dataclasses.replace(source, preprocess=change(source.preprocess or Preprocess(224)))


def check_preprocess(
    spec: str,
    model_args: Mapping[str, Any] | None,
    change: Callable[[Preprocess], Preprocess] | None,
) -> None:
    """Raises UserError where a model can't take images of the size asked for; needs no weights."""
    if change is None:
        return
    model, source = sources.describe(spec, model_args)
    own = source.preprocess or Preprocess(224)
    wanted = change(own)
    if wanted.size != own.size:
        check_size(model, wanted.size)


def is_compact(path: str | Path) -> bool:
    """Whether this is a file that tiedconv wrote, by its head."""
    try:
        with contextlib.closing(SafetensorsFile(Path(path))) as file:
            return "tiedconv" in file.metadata and bool(file.shapes)
    except CheckpointError:
        return False
