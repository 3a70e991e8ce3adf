"""The verb `finetune`: distils the original into a compact model; and what that would take."""

from __future__ import annotations

import contextlib
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

from tiedconv.commands.finetune_inputs import (
    FinetuneInputs,
    FinetuneRequest,
    images_alone,
    imitated,
    open_inputs,
    with_teacher_outputs,
)
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.data.images import are_indices
from tiedconv.io.atomic import check_output
from tiedconv.io.checkpoint import save, size_of_model
from tiedconv.io.run_dir import RunDir
from tiedconv.io.run_state import weights_digest
from tiedconv.runtime.call_hooks import Pick
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.soft_codes import harden
from tiedconv.runtime.tie import set_state, state_of
from tiedconv.sources import Preprocess, sha256_of_file
from tiedconv.training import (
    ACCURACY,
    FREE_TO_CHANGE,
    ClassesMatched,
    Detecting,
    Forecast,
    ImagesPrepared,
    OnEvent,
    TrainConfig,
    TrainResult,
    Unlabelled,
    init_distributed,
    rank_in_environment,
    train,
)
from tiedconv.training import forecast as training_forecast
from tiedconv.version import __version__

_CLASS_TEXT = 50_000  # characters of class names that a history may hold


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
        missed_budget: bytes that the file was converted for, if it takes more now.
    """

    path: Path
    size: int
    teacher: str
    train_images: int
    val_images: int
    held_out: bool
    result: TrainResult
    missed_budget: int | None = None

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
    class_map: str | Path | None = None,
    unlabelled: bool = False,
    task: str = "auto",
    device: str = "auto",
    strict: bool = False,
    resume: bool = False,
    force: bool = False,
    trust_code: bool = False,
    output_name: Pick | None = None,
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
        class_map: which output each class of the data is: `imagenet`, `position`, or a file (see
            `data.class_match`). Without it, classes are matched by name where both sides have
            names.
        unlabelled: ignore labels: class folders may be any folders.
        task: `classification`, `detection`, or `auto`: by the data.
        device: `auto`, `cpu`, `cuda`, ...
        strict: a broken image is an error rather than skipped.
        resume: continue an interrupted run.
        force: replace an existing output.
        trust_code: allow the file to name a function that builds the model.
        output_name: what of the outputs is compared with the teacher's where the distillation is
            the whole loss: a name, names or a function; None for all that the model returns.
        command: the command line, for the file's history.
        on_event: called with progress.

    Raises:
        UserError: a file, folder or option that can't be used; nothing was written.
        TrainingError: the loss became infinite.
    """
    request = FinetuneRequest(
        file, data, config or TrainConfig(), teacher, preprocess, val_split, limit, class_map,
        unlabelled,
        task, device, strict, trust_code, output_name,
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
    class_map: str | Path | None = None,
    unlabelled: bool = False,
    task: str = "auto",
    device: str = "auto",
    strict: bool = False,
    trust_code: bool = False,
    output_name: Pick | None = None,
) -> Forecast:
    """Estimate time and memory of `finetune` with these arguments.

    A few steps are taken and undone; nothing is written. Arguments and errors are those of
    `finetune`.
    """
    return dry_run(FinetuneRequest(
        file, data, config or TrainConfig(), teacher, preprocess, val_split, limit, class_map,
        unlabelled,
        task, device, strict, trust_code, output_name,
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
    check_output(output, force=force)
    folder = RunDir.beside(output)
    # Of several processes the first holds it for all.
    with folder.locked() if rank_in_environment() == 0 else contextlib.nullcontext():
        return _locked(request, output, folder, resume, force, command, on_event)


def _locked(
    request: FinetuneRequest,
    output: Path,
    folder: RunDir,
    resume: bool,
    force: bool,
    command: str | None,
    on_event: OnEvent | None,
) -> Finetuned:
    started = time.monotonic()
    if not (resume or force):
        folder.require_new()
    work = open_inputs(request)
    model, split = work.model, work.split
    with (
        images_alone(work, request.output_name),
        init_distributed(request.device) as (processes, place),
    ):
        blend = OriginalBlend(model, work.teacher) if work.config.progressive > 0 else None
        if on_event is not None and processes.first:
            _announce(work, on_event)
        train_data, val_data = with_teacher_outputs(work, request.data, place)
        if processes.first and not resume:
            folder.clear()
        try:
            with processes.losses_as_errors():
                result = train(
                    model, train_data, val_data, work.config, teacher=work.teacher,
                    blend=blend, device=place, checkpoint_dir=folder.path, resume=resume,
                    made_of=_made_of(work, request.file), started=started, on_event=on_event,
                )  # fmt: skip
        finally:
            if processes.first:
                folder.close()
        entry = _entry(work, result, command, processes.count)
        history = (*state_of(model).history, entry)
        set_state(model, source=work.source.to_json(), history=history)
        missed_budget = pack(model)
        processes.run_on_rank0(lambda: _write(model, output, folder, force=force), place)
    return Finetuned(
        output, output.stat().st_size, work.name, len(split.train), len(split.val),
        split.held_out, result, missed_budget,
    )  # fmt: skip


def dry_run(request: FinetuneRequest) -> Forecast:
    """What `forecast` does."""
    work = open_inputs(request)
    with images_alone(work, request.output_name):
        train, val = imitated(work) or (work.train_data, work.val_data)
        return training_forecast(
            work.model, train, val, work.config, teacher=work.teacher, device=request.device
        )  # fmt: skip


def _announce(work: FinetuneInputs, on_event: OnEvent) -> None:
    """Reports how images are prepared and classes matched, and what is measured."""
    prepared = work.source.preprocess
    stated = None if prepared is None else prepared.to_json()
    on_event(ImagesPrepared(stated, native_size(work.model)))
    if work.match is not None:
        on_event(ClassesMatched(**vars(work.match)))
    images = work.split.train
    if images.objects is not None and work.detects:
        on_event(Detecting(len(images), images.objects.count(images.places)))
    elif not work.labelled:
        on_event(Unlabelled(len(images)))


def pack(model: nn.Module) -> int | None:
    """Pack the integers that were trained, such that the file keeps to its budget of bytes.

    Returns:
        the budget if the file would be larger all the same, else None.
    """
    model.cpu()
    budgets = [e["rounding"]["bytes"] for e in state_of(model).history if "rounding" in e]
    fits = harden(model, (lambda: size_of_model(model) <= budgets[-1]) if budgets else None)
    return None if fits else int(budgets[-1])


def _write(model: nn.Module, output: Path, folder: RunDir, *, force: bool) -> None:
    """Write the result; then remove the checkpoints."""
    save(model.cpu(), output, force=force)
    folder.clear()


def _made_of(work: FinetuneInputs, file: str | Path) -> dict[str, str]:
    """Digests of what a run depends on besides its options."""
    prepared = work.source.preprocess
    return {
        "model": sha256_of_file(file)[:12],
        "teacher's weights": weights_digest(work.teacher),
        "training data": work.split.train.digest()[:12],
        "validation data": work.split.val.digest()[:12],
        "preprocessing": json.dumps(prepared.to_json()) if prepared else "none",
    }


def _entry(
    work: FinetuneInputs, result: TrainResult, command: str | None, processes: int
) -> Mapping[str, Any]:
    """The entry of this run in the file's history. Metrics that are not finite become None."""
    # What does not change the result is left out: a resumed run ends with the same bytes.
    used = dataclasses.replace(work.config, batch_size=result.batch_size, lr=result.lr)
    options = {k: v for k, v in dataclasses.asdict(used).items() if k not in FREE_TO_CHANGE}
    accuracies = (name + when for when in ("_before", "", "_teacher") for name in ACCURACY)
    return {
        "step": "finetune",
        "data": work.split.title,
        "train_images": len(work.split.train),
        "val_images": len(work.split.val),
        "held_out": work.split.held_out,
        **_classes(work),
        "teacher": work.name,
        "options": options,
        "epochs": result.epochs,
        "steps": result.steps,
        "kept_step": result.kept_step,
        "loss": _finite(result.loss),
        **dict.fromkeys(accuracies),
        **{name: _finite(value) for name, value in result.by_name().items()},
        "skipped": result.skipped,
        "processes": processes,
        "command": command,
        "versions": {"tiedconv": __version__, "torch": str(torch.__version__)},
    }


def _classes(work: FinetuneInputs) -> dict[str, Any]:
    """The names of the classes that were learned, where there are any and they are not immense."""
    names = list(work.classes)
    short = sum(map(len, names)) <= _CLASS_TEXT
    return (
        {"classes": names} if work.labelled and names and short and not are_indices(names) else {}
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
