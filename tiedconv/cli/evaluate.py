"""`tiedconv evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import say, warn
from tiedconv.cli.option_groups import ImageOptions, ReadingOptions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(evaluate))


def evaluate(
    model: Annotated[str, typer.Argument(help="A compact file, or a model such as resnet50.")],
    data: common.Data,
    *,
    weights: common.Weights = "default",
    reading: ReadingOptions,
    model_arg: common.ModelArg = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    task: common.Task = "auto",
    limit: common.Limit = None,
    class_map: common.ClassMap = None,
    images: ImageOptions,
    device: common.Device = "auto",
    workers: common.Workers = None,
    strict: common.Strict = False,
    trust_code: common.TrustCode = False,
    json_: common.Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy on labelled images, or a detector's average precision."""
    from tiedconv.cli.progress import TrainingBar
    from tiedconv.commands.evaluate import evaluate as run

    change = images.change()
    with TrainingBar("evaluating") as bar:
        done = run(
            model, data, weights=weights, reading=reading.reading(),
            model_args=common.model_args(model_arg), preprocess=change, batch_size=batch_size,
            task=task, limit=limit, class_map=class_map, device=device, workers=workers,
            strict=strict, trust_code=trust_code, on_event=bar,
        )  # fmt: skip
    if json_:
        common.print_json(done)
        return
    result = done.result
    if done.precision is not None:
        show_precision(done.model, result.images, done.precision)
    else:
        row = (done.model, f"{result.images:,}", render.accuracy(result.top1))
        columns = ("model", "images", "top-1", "top-5", "loss")
        common.show_table(columns, [(*row, render.accuracy(result.top5), f"{result.loss:.4f}")])
    say(render.preparation(done.preprocess))
    warn(render.other_size(done.native_size, done.preprocess.size))
    if result.skipped:
        say(render.skipped(result.skipped))


def show_precision(model: str, images: int, precision: Mapping[str, float]) -> None:
    """A detector's average precision, as COCO defines it."""
    shown = map(render.accuracy, precision.values())
    columns = ("model", "images", "AP", "AP50", "AP75", "small", "medium", "large")
    common.show_table(columns, [(model, f"{images:,}", *shown)])
