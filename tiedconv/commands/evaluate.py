"""The verb `evaluate`: accuracy of a compact file or of any model on a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import tiedconv.sources as sources
from tiedconv.data import ImageList, eval_transform, open_images
from tiedconv.data.class_match import match_classes
from tiedconv.detection import DetectionList, detects
from tiedconv.errors import UserError
from tiedconv.runtime.finite import check_finite
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.tie import is_tied, state_of
from tiedconv.sources import AS_PUBLISHED, Preprocess, Reading, Source
from tiedconv.sources.class_names import class_names_of
from tiedconv.sources.models import is_compact, looks_like_file, open_model
from tiedconv.training import ClassesMatched, EvalResult, OnEvent, evaluate_model, fit_inputs

Change = Callable[[Preprocess], Preprocess]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model, and on what they were measured.

    Args:
        model: the file or spec.
        result: the metrics.
        preprocess: how images were prepared.
        classes: number of classes in the data.
        native_size: height and width that the model was built for, if it says so.
    """

    model: str
    result: EvalResult
    preprocess: Preprocess
    classes: int
    native_size: tuple[int, int] | None = None

    @property
    def precision(self) -> dict[str, float] | None:
        """Of a detector: `ap`, `ap50`, `ap75`, `small`, `medium`, `large`; else None."""
        metrics = self.result.metrics
        return {n.removeprefix("ap_"): v for n, v in metrics.items()} if "ap" in metrics else None


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    weights: str | Path = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Change | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    class_map: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    task: str = "auto",
    strict: bool = False,
    trust_code: bool = False,
    on_event: OnEvent | None = None,
) -> Evaluation:
    """Top-1 and top-5 of a model on images in class folders; average precision of a detector.

    Args:
        model: a compact file, or a model spec.
        data: a folder with `val/` or `test/`, or of class folders; a folder or pattern of tar
            shards; `hf:` with the name or folder of a Hugging Face data set. For a detector, a
            folder in COCO's form.
        weights: for a spec: `default`, `none`, or a file.
        reading: which weights of a file, and what to do where they are not finite.
        model_args: arguments of the model's constructor, for a spec.
        preprocess: changes how images are prepared.
        batch_size: images at a time.
        limit: at most so many images, spread evenly over the classes.
        class_map: which output each class of the data is: `imagenet`, `position`, or a file (see
            `data.class_match`). Without it, classes are matched by name where both sides have
            names.
        device: `auto`, `cpu`, `cuda`, ...
        workers: processes that decode images, None to choose.
        task: `classification`, `detection`, or `auto`: what the data are for.
        strict: a broken image is an error rather than skipped.
        trust_code: allow the file to name a function that builds the model.
        on_event: called with progress.

    Raises:
        UserError: a model, file or folder that can't be used.
    """
    images = open_images(data, limit=limit)
    opened = open_model(
        model,
        weights=weights,
        reading=reading,
        model_args=model_args,
        preprocess=preprocess,
        compact=True,
        trust_code=trust_code,
    )
    classes = images.classes if images.objects is None else images.objects.names
    history = state_of(opened.model).history if is_tied(opened.model) else ()
    known = class_names_of(opened.source, opened.model, history)
    images, match = match_classes(images, known, class_map)
    if match is not None and on_event is not None:
        on_event(ClassesMatched(**vars(match)))
    wanted = opened.source.preprocess or Preprocess(224)
    listed = (
        DetectionList(images, wanted, strict=strict)
        if detects(task, images)
        else ImageList(
            images,
            eval_transform(wanted),
            strict=strict,
            channels=wanted.channel_count(),
            exif=wanted.exif,
        )
    )
    result = evaluate_model(
        opened.model,
        listed,
        batch_size=batch_size,
        device=device,
        workers=workers,
        on_event=on_event,
    )
    return Evaluation(str(model), result, wanted, len(classes), native_size(opened.model))


def open_teacher(
    teacher: str, source: Source, *, trust_code: bool = False
) -> tuple[nn.Module | None, str]:
    """The teacher that a user names, and what to call it.

    Args:
        teacher: `auto` (the original model), `none`, a file of weights for the original's class,
            a compact file, or a model spec.
        source: of the model to be taught. A teacher of its own kind (a compact file, a spec)
            has the images brought from that model's preparation to its own.

    Raises:
        UserError: `auto` can't be done, because the original's weights were a file that is not
            at hand.
    """
    if teacher == "none" or (teacher == "auto" and source.weights == "none"):
        return None, "none"
    if teacher == "auto":
        if source.weights == "default" and source.spec.startswith("hf:"):
            raise UserError(
                f"The teacher should be the original model, which the file says is {source.spec}",
                "A file's own word for a folder or a repository is not followed by default",
                f"Pass --teacher {source.spec} if you trust it, or --teacher none",
                code="original-unavailable",
            )
        if source.weights == "default":
            return open_model(source.spec, model_args=source.kwargs).model, source.spec
        origin = source.weights_name or "a model in memory"
        raise UserError(
            f"The teacher should be the original model, whose weights came from {origin}",
            "A compact file keeps no path to them",
            f"Pass --teacher {source.weights_name or 'WEIGHTS'} (the path), or --teacher none",
            code="original-unavailable",
        )
    if looks_like_file(teacher):
        if is_compact(teacher):
            opened = open_model(teacher, compact=True, trust_code=trust_code)
            _fit_inputs(opened.model, source, opened.source)
            return opened.model, Path(teacher).name
        model = sources.skeleton(source, trust_code=trust_code)
        read = sources.read_weights(Path(teacher))
        sources.load_into(model, read.tensors)
        check_finite(model)
        part = f" ({read.part})" if read.part else ""
        return model.eval(), Path(teacher).name + part
    opened = open_model(teacher)
    _fit_inputs(opened.model, source, opened.source)
    return opened.model, teacher


def _fit_inputs(teacher: nn.Module, source: Source, own: Source) -> None:
    if source.preprocess is not None and own.preprocess is not None:
        fit_inputs(teacher, source.preprocess, own.preprocess)
