"""The verb `finetune`: a short training that heals a compact model; and what it would take."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.commands.evaluate import open_teacher
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.data import ImageList, Labels, Split, eval_transform, open_split, train_transform
from tiedconv.detection import DetectionList, PrecisionChange, as_precision, detects, for_detector
from tiedconv.errors import DataError, UserError
from tiedconv.io.checkpoint import save
from tiedconv.io.run_dir import RunDir
from tiedconv.io.safetensors_file import check_output
from tiedconv.runtime.tie import set_state, state_of
from tiedconv.sources import Preprocess, Source, sha256_of_file
from tiedconv.sources.load import load, source_of, with_preprocess
from tiedconv.training import (
    FREE_TO_CHANGE,
    Agreement,
    Detecting,
    Forecast,
    OnEvent,
    TrainConfig,
    TrainResult,
    Unlabelled,
    as_agreement,
    joined,
    train,
    with_teacher_labels,
)
from tiedconv.training import forecast as training_forecast
from tiedconv.training.state import weights_digest
from tiedconv.version import __version__


@dataclass(frozen=True)
class Finetuned:
    """What `finetune` did.

    Args:
        path: the file written.
        size: of the file, in bytes.
        teacher: what the model was taught by, or `none`.
        train_images, val_images: how many there were.
        held_out: whether the validation images were held out of the training folder.
        result: figures; accuracies are NaN where the images have no labels.
        agreement: what was measured then: how often the teacher's class was chosen.
        precision: what was measured of a detector.
    """

    path: Path
    size: int
    teacher: str
    train_images: int
    val_images: int
    held_out: bool
    result: TrainResult
    agreement: Agreement | None = None
    precision: PrecisionChange | None = None


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

    While it runs, `<output>.run/` holds its newest states; `resume` goes on from there, to the
    very result of an uninterrupted run, and the folder is removed when the result is written.
    Started by `torchrun` or `accelerate launch`, the processes share the work and the first one
    writes.

    Args:
        file: a compact file.
        data: a folder with `train/` and `val/` (or `test/`), or of class folders; a folder or
            pattern of tar shards; `hf:` with the name or folder of a Hugging Face data set.
            Without labels where the teacher's share of the loss (`distill_weight`) is 1; the
            agreement with the teacher is then measured in place of accuracies. For a detector, a
            folder in COCO's form.
        output: the compact file to write.
        config: training options. With `progressive` the training begins at the original model,
            which is faded out over that share of the steps; the teacher must be the original.
        teacher: `auto` (the original), `none`, a file, a spec, or a model.
        preprocess: changes how images are prepared, as the new file will say.
        val_split: share of the images to hold out where there is no validation folder.
        limit: at most so many images in each part.
        unlabelled: don't look for labels: class folders may be any folders.
        task: `classification`, `detection`, or `auto`: what the data are for.
        device: `auto`, `cpu`, `cuda`, ...
        strict: a broken image is an error rather than skipped.
        resume: go on with an interrupted run.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.
        command: the command line, for the file's history.
        on_event: called with progress.

    Raises:
        UserError: a file, folder or option that can't be used; nothing was written.
        TrainingError: the loss became infinite.
    """
    begun = time.monotonic()
    config = config or TrainConfig()
    output = Path(output)
    check_output(output, force=force)
    folder = RunDir.beside(output)
    if not (resume or force):
        folder.require_new()
    work = _open(
        file, data, config, teacher, preprocess=preprocess, val_split=val_split, limit=limit,
        unlabelled=unlabelled, task=task, strict=strict, trust_code=trust_code,
    )  # fmt: skip
    model, split, config = work.model, work.split, work.config
    fading = OriginalBlend(model, work.teacher) if config.progressive > 0 else None
    val_data, agreement, precision = work.val_data, None, None
    with joined(device) as (processes, place):
        if work.detects:
            if on_event is not None and processes.first and split.train.objects is not None:
                objects = split.train.objects.count(split.train.places)
                on_event(Detecting(len(split.train), objects))
        elif not split.labelled:
            if on_event is not None and processes.first:
                on_event(Unlabelled(len(split.train)))
            val_data = with_teacher_labels(
                val_data, _needed(work.teacher, data), model, config, place
            )
        if processes.first and not resume:
            folder.clear()
        try:
            result = train(
                model, work.train_data, val_data, config, teacher=work.teacher, fading=fading,
                device=place, checkpoint_dir=folder.path, resume=resume, labelled=work.labelled,
                made_of=_made_of(work, file), begun=begun, on_event=on_event,
            )  # fmt: skip
        finally:
            if processes.first:
                folder.close()
        if work.detects:
            precision, result = as_precision(result)
        elif not split.labelled:
            agreement, result = as_agreement(result)
        entry = _entry(work, result, _measured(agreement, precision), command, processes.count)
        history = (*state_of(model).history, entry)
        set_state(model, source=work.source.to_json(), history=history)
        processes.run_on_rank0(lambda: _write(model, output, folder, force=force), place)
    return Finetuned(
        output, output.stat().st_size, work.name, len(split.train), len(split.val),
        split.held_out, result, agreement, precision,
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
    """What `finetune` with these arguments would be and take: a few steps are taken and undone.

    Nothing is written. Arguments and errors are those of `finetune`.
    """
    config = config or TrainConfig()
    work = _open(
        file, data, config, teacher, preprocess=preprocess, val_split=val_split, limit=limit,
        unlabelled=unlabelled, task=task, strict=strict, trust_code=trust_code,
    )  # fmt: skip
    return training_forecast(
        work.model, work.train_data, work.val_data, work.config, teacher=work.teacher, device=device
    )


@dataclass(frozen=True)
class _Work:
    """What a training is made of: the model, who teaches it, and what both are shown."""

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
        """Whether it is a detector's."""
        return isinstance(self.train_data, DetectionList)

    @property
    def labelled(self) -> bool:
        """Whether people have said what is in the images."""
        return self.detects or self.split.labelled


def _open(
    file: str | Path,
    data: str | Path,
    config: TrainConfig,
    teacher: str | nn.Module,
    *,
    preprocess: Callable[[Preprocess], Preprocess] | None,
    val_split: float,
    limit: int | None,
    unlabelled: bool,
    task: str,
    strict: bool,
    trust_code: bool,
) -> _Work:
    wants = _labels_wanted(config, teacher, unlabelled)
    split = open_split(
        data, val_fraction=val_split, seed=config.seed, limit=limit, labels=wants
    )  # fmt: skip
    model = load(file, trust_code=trust_code)
    source = with_preprocess(source_of(state_of(model).source), preprocess)
    if isinstance(teacher, str):
        master, name = open_teacher(teacher, source, trust_code=trust_code)
    else:
        master, name = teacher, type(teacher).__name__
    wanted = source.preprocess or Preprocess(224)
    if detects(task, split.train):
        train, val = (DetectionList(p, wanted, strict=strict) for p in (split.train, split.val))
        return _Work(model, source, master, name, split, train, val, for_detector(config))
    shown = train_transform(wanted, config.augment, config.erasing)
    train_data = ImageList(split.train, shown, strict=strict)
    val_data = ImageList(split.val, eval_transform(wanted), strict=strict)
    return _Work(model, source, master, name, split, train_data, val_data, config)


def _write(model: nn.Module, output: Path, folder: RunDir, *, force: bool) -> None:
    """The result; what it could have been resumed from goes when it is there."""
    save(model.cpu(), output, force=force)
    folder.clear()


def _made_of(work: _Work, file: str | Path) -> dict[str, str]:
    """What a run is made of besides its options, each as a short digest."""
    prepared = work.source.preprocess
    return {
        "model": sha256_of_file(file)[:12],
        "teacher's weights": weights_digest(work.teacher),
        "training data": work.split.train.digest()[:12],
        "validation data": work.split.val.digest()[:12],
        "preprocessing": json.dumps(prepared.to_json()) if prepared else "none",
    }


def _labels_wanted(config: TrainConfig, teacher: str | nn.Module, unlabelled: bool) -> Labels:
    """Whether labels are needed: not where the teacher's answers are the whole loss."""
    taught = config.distill_weight == 1 and teacher != "none"
    if unlabelled and not taught:
        raise UserError(
            "Training without labels needs a teacher whose answers are the whole loss",
            f"The share of the distillation is {config.distill_weight:g}, the teacher {teacher}",
            "Use --distill 1 with a teacher, or leave --unlabelled out",
        )
    return "ignored" if unlabelled else "if any" if taught else "needed"


def _needed(teacher: nn.Module | None, data: str | Path) -> nn.Module:
    if teacher is None:
        raise DataError(
            f"The images of {data} have no labels, and there is no teacher",
            "There is nothing to learn from",
            "Name a teacher with --teacher, or give images with labels",
        )
    return teacher


def _entry(
    work: _Work,
    result: TrainResult,
    measured: Mapping[str, float | None],
    command: str | None,
    processes: int,
) -> Mapping[str, Any]:
    """What the file's history says of this run. Figures that are no number are left out."""
    # What does not change the result is left out: a resumed run ends with the same bytes.
    used = dataclasses.replace(work.config, batch_size=result.batch_size)
    options = {k: v for k, v in dataclasses.asdict(used).items() if k not in FREE_TO_CHANGE}
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
        "top1_before": _finite(result.top1_before),
        "top5_before": _finite(result.top5_before),
        "top1": _finite(result.top1),
        "top5": _finite(result.top5),
        "top1_teacher": _finite(result.top1_teacher),
        "top5_teacher": _finite(result.top5_teacher),
        **measured,
        "skipped": result.skipped,
        "processes": processes,
        "command": command,
        "versions": {"tiedconv": __version__, "torch": str(torch.__version__)},
    }


def _measured(
    agreement: Agreement | None, precision: PrecisionChange | None
) -> dict[str, float | None]:
    """What was measured in place of accuracies."""
    if precision is not None:
        return {
            "ap_before": _finite(precision.before), "ap": _finite(precision.after),
            "ap50_before": _finite(precision.before50), "ap50": _finite(precision.after50),
            "ap_teacher": _finite(precision.teacher), "ap50_teacher": _finite(precision.teacher50),
        }  # fmt: skip
    if agreement is not None:
        return {
            "agreement_before": _finite(agreement.before), "agreement": _finite(agreement.after)
        }  # fmt: skip
    return {}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
