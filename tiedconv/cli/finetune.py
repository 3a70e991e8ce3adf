"""`tiedconv finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import hint, say
from tiedconv.cli.progress import TrainingBar
from tiedconv.errors import UserError
from tiedconv.finetune import finetune as run
from tiedconv.training import TrainConfig


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(finetune))


def finetune(
    file: Annotated[Path, typer.Argument(help="A compact file that tiedconv wrote.")],
    data: common.Data,
    output: Annotated[Path, typer.Option("-o", "--output", help="The compact file to write.")],
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the images; 1 if not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    teacher: Annotated[
        str,
        typer.Option(
            help="[b]auto[/b] (the original model), [b]none[/b], a file of weights, or a model."
        ),
    ] = "auto",
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 64,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-4,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    weight_decay: Annotated[float, typer.Option(help="Of matrices; vectors have none.")] = 0.05,
    warmup: Annotated[float, typer.Option(help="Share of the steps, before a cosine.")] = 0.05,
    temperature: Annotated[float, typer.Option(help="Of the distillation.")] = 2.0,
    distill: Annotated[float, typer.Option(help="The teacher's share of the loss, 0 to 1.")] = 0.9,
    label_smoothing: Annotated[float, typer.Option(help="0 to 1.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for none.")] = 1.0,
    augment: Annotated[str, typer.Option(help="none, flip, shift, crop or randaugment.")] = "crop",
    progressive: Annotated[
        float,
        typer.Option(
            help="Share of the steps over which the original is faded into the compact form; 0 "
            "for none."
        ),
    ] = 0.0,
    bn_batches: Annotated[
        int, typer.Option(help="Batches that re-estimate BatchNorm statistics; 0 for none.")
    ] = 20,
    val_split: Annotated[
        float, typer.Option(help="Share to hold out where there is no val/ or test/.")
    ] = 0.1,
    limit: common.Limit = None,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled", help="Look for no labels: with --distill 1, any folders of images do."
        ),
    ] = False,
    image_size: common.ImageSize = None,
    resize: common.Resize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    device: common.Device = "auto",
    workers: common.Workers = None,
    seed: Annotated[int, typer.Option(help="Of order, augmentation and the held-out part.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of this output.")
    ] = False,
    strict: common.Strict = False,
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Heal a compact model by a short training, with the original model as teacher.

    Stored tensors are trained, so ties hold by construction. An interrupted run goes on with
    [b]--resume[/b].
    """
    if epochs is not None and steps is not None:
        raise UserError("--epochs and --steps were both given", remedy="Give one of them")
    config = TrainConfig(
        epochs=None if steps is not None else (1 if epochs is None else epochs),
        steps=steps, batch_size=batch_size, lr=lr, optimizer=optimizer,
        weight_decay=weight_decay, warmup=warmup, temperature=temperature,
        distill_weight=distill, label_smoothing=label_smoothing, clip=clip, augment=augment,
        progressive=progressive, bn_recalibrate=bn_batches, seed=seed, workers=workers,
    )  # fmt: skip
    change = common.preprocess_change(image_size, resize, mean, std, interpolation)
    with TrainingBar() as bar:
        try:
            done = run(
                file, data, output, config, teacher=teacher, preprocess=change,
                val_split=val_split, limit=limit, unlabelled=unlabelled, device=device,
                strict=strict, resume=resume, force=force, trust_code=trust_code,
                command=common.command_line(), on_event=bar,
            )  # fmt: skip
        except KeyboardInterrupt:
            if output.with_name(output.name + ".run").is_dir():
                hint("The last whole epoch is kept: the same command with --resume goes on.")
            raise
    if json_:
        common.print_json(done)
        return
    result = done.result
    columns: tuple[str, ...] = ("", "top-1", "top-5")
    rows: list[render.Row] = [
        ("before", render.accuracy(result.top1_before), render.accuracy(result.top5_before)),
        ("after", render.accuracy(result.top1), render.accuracy(result.top5)),
    ]
    if done.agreement is not None:
        columns = ("", "agreement with the teacher")
        rows = [
            ("before", render.accuracy(done.agreement.before)),
            ("after", render.accuracy(done.agreement.after)),
        ]
    kind = "held-out" if done.held_out else "validation"
    unlabelled_note = "" if done.agreement is None else " without labels"
    common.show_table(columns, rows, f"{done.val_images:,} {kind} images{unlabelled_note}")
    if result.skipped:
        say(render.skipped(result.skipped))
    say(
        f"Wrote {done.path} ({render.size(done.size)}); {result.steps:,} steps in "
        f"{result.seconds:.0f} s, teacher {done.teacher}."
    )
