"""The verb `evaluate`: accuracy of a compact file or of any model on a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

import tiedconv.sources as sources
from tiedconv.data import Images, open_images, open_split
from tiedconv.data.class_match import match_classes
from tiedconv.errors import UserError
from tiedconv.runtime.call_hooks import (
    After,
    ChosenOutput,
    Pick,
    hooked,
    text_hooks,
)
from tiedconv.runtime.finite import check_finite
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.tie import is_tied, state_of
from tiedconv.sources import AS_PUBLISHED, Preprocess, Reading, Source
from tiedconv.sources.class_names import ClassNames, class_names_of
from tiedconv.sources.models import OpenedModel, is_compact, looks_like_file, open_model
from tiedconv.sources.published_weights import Weights
from tiedconv.tasks import EvaluationTask, Given, ZeroShot, task_of
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
        columns: titles of the metrics.
    """

    model: str
    result: EvalResult
    preprocess: Preprocess
    classes: int
    native_size: tuple[int, int] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> dict[str, float] | None:
        """Of a detector: `ap`, `ap50`, `ap75`, `small`, `medium`, `large`; else None."""
        metrics = self.result.metrics
        return {n.removeprefix("ap_"): v for n, v in metrics.items()} if "ap" in metrics else None


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    weights: Weights = "default",
    reading: Reading = AS_PUBLISHED,
    model_args: Mapping[str, Any] | None = None,
    preprocess: Change | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    class_map: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    task: str = "auto",
    output_name: Pick | None = None,
    class_embeddings: str | Path | None = None,
    first_class: int = 0,
    strict: bool = False,
    trust_code: bool = False,
    on_event: OnEvent | None = None,
) -> Evaluation:
    """Accuracy of a classifier, average precision of a detector, mean IoU of a segmenter, or more.

    The data say which: class folders, boxes, or masks. See `tiedconv.tasks` for others.

    Args:
        model: a compact file, or a model spec.
        data: a folder with `val/` or `test/`, or of class folders; a folder or pattern of tar
            shards; `hf:` with the name or folder of a Hugging Face data set. For a detector, a
            folder in COCO's form.
        weights: for a spec: `default`, `none`, a file, or published weights of torchvision.
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
        task: a name in `tasks.all_tasks()`, or `auto`: what the data are for.
        output_name: what of the model's output is used: a name, names or a function.
        class_embeddings: a safetensors file of one matrix `(classes, width)`: the class of an
            image is the row with the largest cosine to the model's features (zero-shot).
        first_class: the value in a mask that means the model's first class.
        strict: a broken image is an error rather than skipped.
        trust_code: allow the file to name a function that builds the model.
        on_event: called with progress.

    Raises:
        UserError: a model, file or folder that can't be used.
        DataError: data that are not for the task or the model.
    """
    images, train, at = _data(data, limit, task)
    classes = images.classes if images.objects is None else images.objects.names
    opened = open_model(
        model,
        weights=weights,
        reading=reading,
        model_args=model_args,
        preprocess=preprocess,
        compact=True,
        trust_code=trust_code,
    )
    if at.by_outputs:
        images, match = match_classes(images, _class_names(opened, class_embeddings), class_map)
        if match is not None and on_event is not None:
            on_event(ClassesMatched(**vars(match)))
    wanted = opened.source.preprocess or Preprocess(224)
    given = Given(images, train, wanted, first_class, strict, batch_size, workers)
    picks = _picks(output_name, class_embeddings)
    with hooked(opened.model, text_hooks(opened.model), picks):
        result = evaluate_model(
            opened.model,
            at.data(given),
            batch_size=batch_size,
            device=device,
            workers=workers,
            on_event=on_event,
        )
    size = native_size(opened.model)
    return Evaluation(str(model), result, wanted, len(classes), size, at.columns)


def _data(
    data: str | Path, limit: int | None, task: str
) -> tuple[Images, Images | None, EvaluationTask]:
    """The images to evaluate on, those to train on where the task needs them, and the task."""
    images = open_images(data, limit=limit)
    at = task_of(task, images)
    if not at.with_train:
        return images, None, at
    split = open_split(data, limit=limit)
    return split.val, split.train, at


def _class_names(opened: OpenedModel, class_embeddings: str | Path | None) -> ClassNames | None:
    """The names of the outputs' classes; of given embeddings they are not known."""
    if class_embeddings is not None:
        return None
    history = state_of(opened.model).history if is_tied(opened.model) else ()
    return class_names_of(opened.source, opened.model, history)


def _picks(output_name: Pick | None, class_embeddings: str | Path | None) -> list[After]:
    """What the outputs of a model go through before they are scored."""
    picks: list[After] = [] if output_name is None else [ChosenOutput(output_name)]
    if class_embeddings is not None:
        picks.append(ChosenOutput(ZeroShot(class_embeddings)))
    return picks


def open_teacher(
    teacher: str, source: Source, *, trust_code: bool = False
) -> tuple[nn.Module | None, str]:
    """The teacher that a user names, and what to call it.

    Args:
        teacher: `auto` (the original model), `none`, a file of weights for the original's class,
            a compact file, or a model spec.
        source: of the model to be taught. A teacher of its own kind (a compact file, a spec)
            has the images brought from that model's preparation to its own; the model that the
            file was made from sees them as the compact one does, at whatever size that is.

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
    if opened.source.spec != source.spec:
        _fit_inputs(opened.model, source, opened.source)
    return opened.model, teacher


def _fit_inputs(teacher: nn.Module, source: Source, own: Source) -> None:
    if source.preprocess is not None and own.preprocess is not None:
        fit_inputs(teacher, source.preprocess, own.preprocess)
