"""`tiedconv evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import say
from tiedconv.cli.progress import TrainingBar
from tiedconv.evaluate import evaluate as run


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(evaluate))


def evaluate(
    model: Annotated[str, typer.Argument(help="A compact file, or a model such as resnet50.")],
    data: common.Data,
    weights: common.Weights = "default",
    model_arg: common.ModelArg = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 64,
    limit: common.Limit = None,
    image_size: common.ImageSize = None,
    resize: common.Resize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    device: common.Device = "auto",
    workers: common.Workers = None,
    strict: common.Strict = False,
    trust_code: common.TrustCode = False,
    json_: common.Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy on labelled images."""
    change = common.preprocess_change(image_size, resize, mean, std, interpolation)
    with TrainingBar("evaluating") as bar:
        done = run(
            model, data, weights=weights, model_args=common.model_args(model_arg),
            preprocess=change, batch_size=batch_size, limit=limit, device=device,
            workers=workers, strict=strict, trust_code=trust_code, on_event=bar,
        )  # fmt: skip
    if json_:
        common.print_json(done)
        return
    result = done.result
    row = (done.model, f"{result.images:,}", render.accuracy(result.top1))
    columns = ("model", "images", "top-1", "top-5", "loss")
    common.show_table(columns, [(*row, render.accuracy(result.top5), f"{result.loss:.4f}")])
    if result.skipped:
        say(render.skipped(result.skipped))
