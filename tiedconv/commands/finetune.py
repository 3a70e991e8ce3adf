"""The verb `finetune`: distils the original into a compact model; and what that would take."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.commands.evaluate import open_teacher
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.data import ImageList, Labels, Split, eval_transform, open_split, train_transform
from tiedconv.detection import DetectionList, detects, for_detector
from tiedconv.errors import DataError, UserError
from tiedconv.io.atomic import check_output
from tiedconv.io.checkpoint import save
from tiedconv.io.run_dir import RunDir
from tiedconv.io.run_state import weights_digest
from tiedconv.runtime.tie import set_state, state_of
from tiedconv.sources import Preprocess, Source, sha256_of_file
from tiedconv.sources.models import load, source_of, with_preprocess
from tiedconv.training import (
    ACCURACY,
    FREE_TO_CHANGE,
    Detecting,
    Forecast,
    OnEvent,
    TrainConfig,
    TrainResult,
    Unlabelled,
    init_distributed,
    train,
    with_teacher_labels,
)
from tiedconv.training import forecast as training_forecast
from tiedconv.version import __version__


@dataclass(frozen=True)
class FinetuneRequest:
    """Which model to train on which images, and how; fields as the arguments of `finetune`."""

    file: str | Path
    data: str | Path
    config: TrainConfig = field(default_factory=TrainConfig)
    teacher: str | nn.Module = "auto"
    preprocess: Callable[[Preprocess], Preprocess] | None = None
    val_split: float = 0.1
    limit: int | None = None
    unlabelled: bool = False
    task: str = "auto"
    device: str = "auto"
    strict: bool = False
    trust_code: bool = False


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` did.

    Args:
        path: the file written.
        size: of the file, in bytes.
        teacher: the name of the teacher, or `none`.
        train_images, val_images: how many there were.
        held_out: whether the validation images were held out of the training folder.
        result: the metrics and what was trained.
    """

    path: Path
    size: int
    teacher: str
    train_images: int
    val_images: int
    held_out: bool
    result: TrainResult

    @property
    def agreement(self) -> dict[str, float] | None:
        """Agreement with the teacher `before` and `after`, for images without labels."""
        return self._change("agreement", "")

    @property
    def precision(self) -> dict[str, float] | None:
        """AP and AP50 `before`, `before50`, `after`, ... of a detector."""
        ap, ap50 = self._change("ap", ""), self._change("ap50", "50")
        return {**ap, **ap50} if ap is not None and ap50 is not None else None

    def _change(self, name: str, suffix: str) -> dict[str, float] | None:
        result = self.result
        if name not in result.metrics:
            return None
        change = {
            f"before{suffix}": result.metrics_before[name],
            f"after{suffix}": result.metrics[name],
        }
        if name != "agreement":
            change[f"teacher{suffix}"] = result.metrics_teacher.get(name, math.nan)
        return change


def finetune(
    file: str | Path,
    data: str | Path,
    output: str | Path,
    config: TrainConfig | None = None,
    *,
    teacher: str | nn.Module = "auto",
    preprocess: Callable[[Preprocess], Preprocess] | None = None,
    val_split: float = 0.1,
    limit: int | None = None,
    unlabelled: bool = False,
    task: str = "auto",
    device: str = "auto",
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    trust_code: bool = False,
    command: str | None = None,
    on_event: OnEvent | None = None,
) -> Finetuned:
    """Train a compact model on images, with the original as teacher, and write the result.

    While it runs, `<output>.run/` holds its newest checkpoints; `resume` continues from there,
    with the same result as an uninterrupted run, and the folder is removed when the result is
    written. Started by `torchrun` or `accelerate launch`, the processes share the work and the
    first one writes.

    Args:
        file: a compact file.
        data: a folder with `train/` and `val/` (or `test/`), or of class folders; a folder or
            pattern of tar shards; `hf:` with the name or folder of a Hugging Face data set.
            Labels are optional where the distillation is the whole loss (`distill_weight` is 1);
            without them the agreement with the teacher is measured instead of accuracy. For a
            detector, a folder in COCO's form.
        output: the compact file to write.
        config: training options. With `progressive` the training begins at the original weights,
            which are annealed to the compact ones over that fraction of the steps; the teacher
            must be the original.
        teacher: `auto` (the original), `none`, a file, a spec, or a model.
        preprocess: changes how images are prepared; the new file records it.
        val_split: fraction of the images to hold out where there is no validation folder.
        limit: maximum number of images in each part.
        unlabelled: ignore labels: class folders may be any folders.
        task: `classification`, `detection`, or `auto`: by the data.
        device: `auto`, `cpu`, `cuda`, ...
        strict: a broken image is an error rather than skipped.
        resume: continue an interrupted run.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.
        command: the command line, for the file's history.
        on_event: called with progress.

    Raises:
        UserError: a file, folder or option that can't be used; nothing was written.
        TrainingError: the loss became infinite.
    """
    request = FinetuneRequest(
        file, data, config or TrainConfig(), teacher, preprocess, val_split, limit, unlabelled,
        task, device, strict, trust_code,
    )  # fmt: skip
    return run(
        request, Path(output), resume=resume, force=force, command=command, on_event=on_event
    )  # fmt: skip


def forecast(
    file: str | Path,
    data: str | Path,
    config: TrainConfig | None = None,
    *,
    teacher: str | nn.Module = "auto",
    preprocess: Callable[[Preprocess], Preprocess] | None = None,
    val_split: float = 0.1,
    limit: int | None = None,
    unlabelled: bool = False,
    task: str = "auto",
    device: str = "auto",
    strict: bool = False,
    trust_code: bool = False,
) -> Forecast:
    """Estimate time and memory of `finetune` with these arguments.

    A few steps are taken and undone; nothing is written. Arguments and errors are those of
    `finetune`.
    """
    return dry_run(FinetuneRequest(
        file, data, config or TrainConfig(), teacher, preprocess, val_split, limit, unlabelled,
        task, device, strict, trust_code,
    ))  # fmt: skip


def run(
    request: FinetuneRequest,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    command: str | None = None,
    on_event: OnEvent | None = None,
) -> Finetuned:
    """What `finetune` does; the arguments are its own."""
    started = time.monotonic()
    check_output(output, force=force)
    folder = RunDir.beside(output)
    if not (resume or force):
        folder.require_new()
    work = _open(request)
    model, split = work.model, work.split
    blend = OriginalBlend(model, work.teacher) if work.config.progressive > 0 else None
    with init_distributed(request.device) as (processes, place):
        if on_event is not None and processes.first:
            _announce(work, on_event)
        val_data = work.val_data
        if not work.labelled:
            val_data = with_teacher_labels(
                val_data, _required_teacher(work, request.data), model, work.config, place
            )
        if processes.first and not resume:
            folder.clear()
        try:
            result = train(
                model, work.train_data, val_data, work.config, teacher=work.teacher, blend=blend,
                device=place, checkpoint_dir=folder.path, resume=resume,
                made_of=_made_of(work, request.file), started=started, on_event=on_event,
            )  # fmt: skip
        finally:
            if processes.first:
                folder.close()
        entry = _entry(work, result, command, processes.count)
        history = (*state_of(model).history, entry)
        set_state(model, source=work.source.to_json(), history=history)
        processes.run_on_rank0(lambda: _write(model, output, folder, force=force), place)
    return Finetuned(
        output, output.stat().st_size, work.name, len(split.train), len(split.val),
        split.held_out, result,
    )  # fmt: skip


def dry_run(request: FinetuneRequest) -> Forecast:
    """What `forecast` does."""
    work = _open(request)
    return training_forecast(
        work.model, work.train_data, work.val_data, work.config, teacher=work.teacher,
        device=request.device,
    )  # fmt: skip


@dataclass(frozen=True)
class _Work:
    """What a training needs: the model, its teacher and the images."""

    model: nn.Module
    source: Source
    teacher: nn.Module | None
    name: str
    split: Split
    train_data: Dataset[Any]
    val_data: Dataset[Any]
    config: TrainConfig

    @property
    def detects(self) -> bool:
        """Whether a detector is trained."""
        return isinstance(self.train_data, DetectionList)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels or boxes."""
        return self.detects or self.split.labelled


def _open(request: FinetuneRequest) -> _Work:
    config, teacher, strict = request.config, request.teacher, request.strict
    split = open_split(
        request.data, val_fraction=request.val_split, seed=config.seed, limit=request.limit,
        labels=_label_use(request),
    )  # fmt: skip
    model = load(request.file, trust_code=request.trust_code)
    source = with_preprocess(source_of(state_of(model).source), request.preprocess)
    if isinstance(teacher, str):
        network, name = open_teacher(teacher, source, trust_code=request.trust_code)
    else:
        network, name = teacher, type(teacher).__name__
    prepared = source.preprocess or Preprocess(224)
    train: Dataset[Any]
    val: Dataset[Any]
    if detects(request.task, split.train):
        config = for_detector(config)
        train, val = (DetectionList(p, prepared, strict=strict) for p in (split.train, split.val))
    else:
        transform = train_transform(prepared, config.augment, config.erasing)
        train = ImageList(split.train, transform, strict=strict)
        val = ImageList(split.val, eval_transform(prepared), strict=strict)
    return _Work(model, source, network, name, split, train, val, config)


def _announce(work: _Work, on_event: OnEvent) -> None:
    """Reports what is measured, where it isn't accuracy."""
    images = work.split.train
    if images.objects is not None and work.detects:
        on_event(Detecting(len(images), images.objects.count(images.places)))
    elif not work.labelled:
        on_event(Unlabelled(len(images)))


def _write(model: nn.Module, output: Path, folder: RunDir, *, force: bool) -> None:
    """Write the result; then remove the checkpoints."""
    save(model.cpu(), output, force=force)
    folder.clear()


def _made_of(work: _Work, file: str | Path) -> dict[str, str]:
    """Digests of what a run depends on besides its options."""
    prepared = work.source.preprocess
    return {
        "model": sha256_of_file(file)[:12],
        "teacher's weights": weights_digest(work.teacher),
        "training data": work.split.train.digest()[:12],
        "validation data": work.split.val.digest()[:12],
        "preprocessing": json.dumps(prepared.to_json()) if prepared else "none",
    }


def _label_use(request: FinetuneRequest) -> Labels:
    """Whether labels are needed: not where the distillation is the whole loss."""
    weight, teacher = request.config.distill_weight, request.teacher
    distilled = weight == 1 and teacher != "none"
    if request.unlabelled and not distilled:
        raise UserError(
            "Training without labels needs a teacher, and distillation as the whole loss",
            f"The distillation's weight is {weight:g}, the teacher {teacher}",
            "Use --distill 1 with a teacher, or leave --unlabelled out",
            code="unlabelled-needs-distillation",
        )
    return "ignore" if request.unlabelled else "optional" if distilled else "required"


def _required_teacher(work: _Work, data: str | Path) -> nn.Module:
    if work.teacher is None:
        raise DataError(
            f"The images of {data} have no labels, and there is no teacher",
            "There is nothing to learn from",
            "Name a teacher with --teacher, or give images with labels",
            code="no-labels",
        )
    return work.teacher


def _entry(
    work: _Work, result: TrainResult, command: str | None, processes: int
) -> Mapping[str, Any]:
    """The entry of this run in the file's history. Metrics that are not finite become None."""
    # What does not change the result is left out: a resumed run ends with the same bytes.
    used = dataclasses.replace(work.config, batch_size=result.batch_size)
    options = {k: v for k, v in dataclasses.asdict(used).items() if k not in FREE_TO_CHANGE}
    accuracies = (name + when for when in ("_before", "", "_teacher") for name in ACCURACY)
    return {
        "step": "finetune",
        "data": work.split.title,
        "train_images": len(work.split.train),
        "val_images": len(work.split.val),
        "held_out": work.split.held_out,
        "teacher": work.name,
        "options": options,
        "epochs": result.epochs,
        "steps": result.steps,
        "loss": _finite(result.loss),
        **dict.fromkeys(accuracies),
        **{name: _finite(value) for name, value in result.by_name().items()},
        "skipped": result.skipped,
        "processes": processes,
        "command": command,
        "versions": {"tiedconv": __version__, "torch": str(torch.__version__)},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
