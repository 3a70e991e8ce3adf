"""`tiedconv finetune`."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import hint, say
from tiedconv.cli.option_groups import ImageOptions
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.commands.finetune import Finetuned
    from tiedconv.training import Event, Forecast, OnEvent, TrainConfig

AUGMENTS = "none, flip, shift, crop, randaugment, trivialaugment"

# Options by panel of the help.
_schedule = functools.partial(common.option_in, "Schedule")
_loss = functools.partial(common.option_in, "Loss")
_augmentation = functools.partial(common.option_in, "Augmentation")
_images = functools.partial(common.option_in, common.IMAGES)
_logging = functools.partial(common.option_in, "Logging")


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        finetune,
        "tiedconv finetune compact.safetensors --data IMAGES -o finetuned.safetensors",
        "tiedconv finetune compact.safetensors --data PHOTOS --unlabelled --distill 1 "
        "-o finetuned.safetensors",
        "tiedconv finetune compact.safetensors --data IMAGES -o finetuned.safetensors --dry-run",
    )


def finetune(
    file: Annotated[Path, typer.Argument(help="A compact file that tiedconv wrote.")],
    data: common.Data,
    *,
    output: Annotated[Path, typer.Option("-o", "--output", help="The compact file to write.")],
    epochs: Annotated[
        float | None, _schedule("Passes over the training images; 1 if not given.")
    ] = None,
    steps: Annotated[int | None, _schedule("Number of optimiser steps, instead of epochs.")] = None,
    time_budget: Annotated[
        str | None, _schedule("Train for a given time, such as 20m or 1h30m, instead.")
    ] = None,
    batch_size: Annotated[
        str,
        _schedule("Images per step; [b]auto[/b] finds a size that fits into memory and is fast."),
    ] = "64",
    lr: Annotated[
        float | None,
        _schedule("Peak learning rate; found for the model by a short test if not given."),
    ] = None,
    warmup: Annotated[
        float, _schedule("Fraction of steps for linear warmup (then cosine decay).")
    ] = 0.05,
    only: Annotated[
        list[str] | None,
        _schedule(
            "Train only parameters whose names match a pattern, such as '*decoder*'. Repeatable."
        ),
    ] = None,
    layer_decay: Annotated[
        float, _schedule("Layer-wise learning-rate decay factor (1 disables).")
    ] = 1.0,
    optimizer: Annotated[str, _schedule("adamw or sgd.")] = "adamw",
    weight_decay: Annotated[
        float, _schedule("Weight decay of matrices; vectors are not decayed.")
    ] = 0.05,
    clip: Annotated[float, _schedule("Maximum gradient norm; 0 for no clipping.")] = 1.0,
    ema: Annotated[
        float, _schedule("Decay of the EMA of the weights, such as 0.999; 0 for none.")
    ] = 0.0,
    progressive: Annotated[
        float,
        _schedule(
            "Fraction of steps over which original weights are annealed to tied ones; 0 for none."
        ),
    ] = 0.0,
    bn_batches: Annotated[
        int, _schedule("Batches to re-estimate BatchNorm statistics from; 0 for none.")
    ] = 20,
    keep_best: Annotated[
        bool,
        _schedule("End with the state that did best on held-out images, or with the last."),
    ] = True,
    teacher: Annotated[
        str,
        _loss("[b]auto[/b] (the original model), [b]none[/b], a weights file, or a model."),
    ] = "auto",
    distill: Annotated[float, _loss("Weight of the distillation loss, 0 to 1.")] = 0.5,
    distillation: Annotated[
        str, _loss("soft (the teacher's probabilities) or hard (its predicted class).")
    ] = "soft",
    temperature: Annotated[float, _loss("Temperature of soft distillation.")] = 2.0,
    features: Annotated[
        float, _loss("Weight of feature distillation (outputs of the blocks); 0 for none.")
    ] = 0.0,
    label_smoothing: Annotated[float, _loss("Label smoothing, 0 to 1.")] = 0.0,
    augment: Annotated[str, _augmentation(f"{AUGMENTS}.")] = "crop",
    erasing: Annotated[float, _augmentation("Probability of random erasing, 0 to 1.")] = 0.0,
    mixup: Annotated[float, _augmentation("Alpha of MixUp, such as 0.8; 0 for none.")] = 0.0,
    cutmix: Annotated[float, _augmentation("Alpha of CutMix, such as 1; 0 for none.")] = 0.0,
    val_split: Annotated[
        float, _images("Fraction to hold out where there is no val/ or test/.")
    ] = 0.1,
    task: common.Task = "auto",
    limit: common.Limit = None,
    class_map: common.ClassMap = None,
    output_name: common.OutputName = None,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled", help="Ignore labels: with --distill 1, any folders of images will do."
        ),
    ] = False,
    images: ImageOptions,
    accumulate: Annotated[
        int, typer.Option(help="Gradient-accumulation micro-batches per step.")
    ] = 1,
    amp: Annotated[str, typer.Option(help="auto, off, bf16 or fp16.")] = "auto",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile where it works.")
    ] = False,
    sharding: Annotated[
        str, typer.Option(help="Multi-process strategy: ddp (replicated) or fsdp (sharded).")
    ] = "ddp",
    checkpoint_minutes: Annotated[
        float, typer.Option(help="Minutes between two checkpoints.")
    ] = 10.0,
    keep: Annotated[
        int, typer.Option("--keep-checkpoints", help="Number of checkpoints to keep.")
    ] = 2,
    log: Annotated[
        Path | None,
        _logging(
            "A log to write: one JSON object per line. --resume appends to it.",
            # torchrun takes --log, wherever it stands, for one of its own options, cut short.
            "--log",
            "--log-file",
        ),
    ] = None,
    tensorboard: Annotated[
        Path | None, _logging("A folder for TensorBoard.", metavar="DIR")
    ] = None,
    picture: Annotated[
        Path | None, _logging("A plot of loss and accuracy; default OUTPUT.training.png.")
    ] = None,
    no_picture: Annotated[bool, _logging("Draw no plot.", "--no-picture")] = False,
    device: common.Device = "auto",
    workers: common.Workers = None,
    seed: Annotated[
        int, typer.Option(help="Seed of order, augmentation and the held-out part.")
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run of this output.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Estimate time and memory from a few steps; write nothing."),
    ] = False,
    strict: common.Strict = False,
    trust_code: common.TrustCode = False,
    force: common.ForceRestart = False,
    json_: common.Json = False,
) -> None:
    """Fine-tune a compact model by distilling the original.

    Stored tensors are trained, so ties hold by construction. The result is the state that did best
    on held-out images, which may be the start. [b]--resume[/b] continues an
    interrupted run. On several GPUs: torchrun --nproc-per-node 8 -m tiedconv finetune ...
    """
    from tiedconv.cli import training_logs
    from tiedconv.cli.progress import TrainingBar
    from tiedconv.commands.finetune import dry_run as forecast
    from tiedconv.commands.finetune import run
    from tiedconv.commands.finetune_inputs import FinetuneRequest
    from tiedconv.io.run_dir import RunDir
    from tiedconv.training import TrainConfig, rank_in_environment

    lengths = {"--epochs": epochs, "--steps": steps, "--time-budget": time_budget}
    given = [name for name, value in lengths.items() if value is not None]
    if len(given) > 1:
        raise UserError(
            f"{' and '.join(given)} were both given",
            hint="Give one of them",
            code="options-conflict",
        )
    config = TrainConfig(
        epochs=epochs if given else 1, steps=steps, time_budget=_seconds(time_budget),
        batch_size=_batch_size(batch_size), lr=lr, only=tuple(only or ()), optimizer=optimizer,
        weight_decay=weight_decay, layer_decay=layer_decay, warmup=warmup,
        distillation=distillation, temperature=temperature, distill_weight=distill,
        features=features, label_smoothing=label_smoothing, clip=clip, ema=ema, augment=augment,
        erasing=erasing, mixup=mixup, cutmix=cutmix, progressive=progressive,
        bn_recalibrate=bn_batches, keep_best=keep_best, seed=seed, workers=workers,
        accumulate=accumulate, amp=amp, sharding=sharding, compile=compile_,
        checkpoint_minutes=checkpoint_minutes, keep=keep,
    )  # fmt: skip
    request = FinetuneRequest(
        file, data, config, teacher, images.change(), val_split, limit, class_map, unlabelled, task,
        device, strict, trust_code, output_name,
    )  # fmt: skip
    if dry_run:
        found = forecast(request)
        if rank_in_environment() == 0:
            show_forecast(found, config, json_=json_)
        return
    files = training_logs.Files.wanted(
        output, log, tensorboard, picture, no_picture, force=force, resume=resume
    )
    noted = {"data": data, "teacher": teacher, "device": device, "command": common.command_line()}
    kept = RunDir.beside(output)
    restarts = resume and not kept.kept()
    with TrainingBar() as bar, files.watchers(file, config, bar.line, noted) as watch:
        if restarts and rank_in_environment() == 0:
            hint(f"There is no checkpoint in {kept.path}: the training starts from the beginning.")
        try:
            done = run(
                request, output, resume=resume, force=force, command=common.command_line(),
                on_event=_both(bar, watch),
            )  # fmt: skip
        except KeyboardInterrupt:
            if kept.kept() and rank_in_environment() == 0:
                hint(
                    "The checkpoints are kept: the same command with --resume continues from there."
                )
            raise
        if rank_in_environment() > 0:
            return
        written = watch.finish(done.result)
    show_result(done, written, json_=json_)


def _seconds(text: str | None) -> float | None:
    """`90`, `45s`, `20m`, `1h30m` in seconds."""
    if text is None:
        return None
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text.strip())
    numbers = [int(part or 0) for part in found.groups()] if found else [0]
    if not any(numbers):
        raise UserError(
            f"--time-budget {text} is not a valid duration",
            hint="Write it as 45s, 20m or 1h30m",
            code="invalid-duration",
        )
    hours, minutes, seconds = numbers
    return 3600.0 * hours + 60.0 * minutes + seconds


def _batch_size(text: str) -> int:
    if text == "auto":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"Invalid --batch-size {text}",
            hint="Choose 1 or more, or auto",
            code="invalid-batch-size",
        )
    return int(text)


def show_forecast(found: Forecast, config: TrainConfig, *, json_: bool) -> None:
    """Print the estimate of a training."""
    if json_:
        common.print_json(found)
        return
    pace = found.pace
    where = found.device if found.processes == 1 else f"each of {found.processes} x {found.device}"
    rows: list[render.Row] = [
        ("training images", f"{found.images:,}"),
        ("validation images", f"{found.val_images:,}"),
        ("steps", f"{found.steps:,} of {render.counted(found.batch_size, 'image')}"),
        ("epochs", f"{found.epochs:,}"),
        ("learning rate", _rate(config, found.warmup)),
        ("trainable parameters", f"{found.trained:,}"),
        ("per step", f"{1000 * pace.step_seconds:,.1f} ms, {pace.images_per_second:,.0f} images/s"),
        ("per evaluation", f"{pace.eval_seconds:,.1f} s"),
        ("batch norm statistics", f"{pace.norm_seconds:,.1f} s"),
        ("total", render.duration(found.seconds)),
        ("memory", f"{render.size(pace.memory)} on {where}" if pace.memory else "unknown"),
    ]  # fmt: skip
    if found.not_compiled is not None:
        rows.append(("not compiled", found.not_compiled))
    common.show_table(("", "forecast"), rows, text=2)
    say("Nothing was written. Run it without --dry-run to train.")


def show_result(done: Finetuned, written: Mapping[str, Path | None], *, json_: bool) -> None:
    """Print the result of a training."""
    if json_:
        from tiedconv.io.json_text import json_ready

        common.print_json({**json_ready(done), **written})
        return
    from tiedconv.training import METRIC_TITLES

    result = done.result
    names = [name for name in result.metrics if name in METRIC_TITLES]
    columns = ("", *(METRIC_TITLES[name] for name in names))
    measured = {"before": result.metrics_before, "after": result.metrics}
    if result.metrics_teacher:
        measured["teacher"] = result.metrics_teacher
    rows: list[render.Row] = [
        (when, *(render.accuracy(metrics.get(name)) for name in names))
        for when, metrics in measured.items()
    ]
    kind = "held-out" if done.held_out else "validation"
    unlabelled_note = "" if done.agreement is None else " without labels"
    common.show_table(columns, rows, f"{done.val_images:,} {kind} images{unlabelled_note}")
    if result.kept_step == 0:
        say(
            "No step came nearer to the aim on held-out images than the start, so the model is as "
            "it was before. A lower --lr, more images or a longer training may help."
        )
    elif result.kept_step is not None and result.kept_step < result.steps:
        say(
            f"Kept as it was after step {result.kept_step:,} of {result.steps:,}, where its loss "
            "on held-out images was lowest."
        )
    if result.skipped:
        say(render.skipped(result.skipped))
    say(
        f"Wrote {done.path} ({render.size(done.size)}); {render.counted(result.steps, 'step')} in "
        f"{result.seconds:.0f} s, teacher {done.teacher}."
    )
    if done.missed_budget is not None:
        hint(
            f"The file is larger than the {render.size(done.missed_budget)} that it was converted "
            "for: the trained integers could not be packed into that. A lower --lr or fewer steps "
            "change them less; `tiedconv convert` with fewer --bytes leaves room."
        )
    if written["picture"]:
        say(f"Loss and accuracy are drawn in {written['picture']}.")


def _rate(config: TrainConfig, warmup: int) -> str:
    peak = "what suits the model, at most " if config.lr is None else ""
    low = config.peak_lr * config.min_lr
    return f"up to {peak}{config.peak_lr:g} in {warmup:,} steps, then down to {low:g}"


def _both(first: OnEvent, second: OnEvent) -> OnEvent:
    def both(event: Event) -> None:
        first(event)
        second(event)

    return both
