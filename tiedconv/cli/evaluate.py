"""`tiedconv evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import say, warn
from tiedconv.cli.option_groups import ImageOptions, ReadingOptions


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        evaluate,
        "tiedconv evaluate compact.safetensors --data IMAGES",
        "tiedconv evaluate resnet50 --data IMAGES --limit 1000",
    )


def evaluate(
    model: Annotated[str, typer.Argument(help="A compact file, or a model such as resnet50.")],
    data: common.Data,
    *,
    weights: common.Weights = "default",
    reading: ReadingOptions,
    model_arg: common.ModelArg = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    task: Annotated[
        str,
        common.option_in(
            common.IMAGES,
            f"{', '.join(common.names_in('tasks'))}, or [b]auto[/b] (by the data).",
            choices=("auto", *common.names_in("tasks")),
        ),
    ] = "auto",
    limit: common.Limit = None,
    class_map: common.ClassMap = None,
    output_name: common.OutputName = None,
    class_embeddings: Annotated[
        Path | None,
        common.option_in(
            common.IMAGES,
            "Zero-shot: a safetensors file with one embedding for each class (classes, width).",
        ),
    ] = None,
    first_class: Annotated[
        int,
        common.option_in(
            common.IMAGES,
            "Of masks: the value of the model's first class; 1 where 0 means no class (ADE20K).",
            min=0,
        ),
    ] = 0,
    images: ImageOptions,
    device: common.Device = "auto",
    workers: common.Workers = None,
    strict: common.Strict = False,
    trust_code: common.TrustCode = False,
    json_: common.Json = False,
) -> None:
    """Measure what a model is for: accuracy, average precision, mean IoU, by the data.

    [b]--data[/b] has class folders (top-1 and top-5), boxes in COCO's form (a detector), or a mask
    for each image (a segmenter). [b]--task neighbours[/b] lets the nearest images of train/ vote,
    for models that give features; [b]--class-embeddings[/b] makes a classifier of CLIP.
    """
    from tiedconv.cli.progress import TrainingBar
    from tiedconv.commands.evaluate import evaluate as run

    change = images.change()
    with TrainingBar("evaluating") as bar:
        done = run(
            model, data, weights=weights, reading=reading.reading(),
            model_args=common.model_args(model_arg), preprocess=change, batch_size=batch_size,
            task=task, limit=limit, class_map=class_map, output_name=output_name,
            class_embeddings=class_embeddings, first_class=first_class, device=device,
            workers=workers, strict=strict, trust_code=trust_code, on_event=bar,
        )  # fmt: skip
    if json_:
        common.print_json(done)
        return
    result = done.result
    row = [done.model, f"{result.images:,}"]
    row += [render.accuracy(result.metrics[name]) for name in done.columns]
    columns = ["model", "images", *done.columns.values()]
    if "top1" in done.columns:
        row, columns = [*row, f"{result.loss:.4f}"], [*columns, "loss"]
    common.show_table(columns, [tuple(row)])
    say(render.preparation(done.preprocess))
    warn(render.other_size(done.native_size, done.preprocess.size))
    if result.skipped:
        say(render.skipped(result.skipped))
