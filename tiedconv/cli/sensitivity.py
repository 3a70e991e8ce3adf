"""`tiedconv sensitivity`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from tiedconv.calibration import CalibConfig
from tiedconv.cli import common, render
from tiedconv.cli.common import hint, say
from tiedconv.cli.progress import Bar
from tiedconv.commands.sensitivity import Sensed, Sensitivity, draw
from tiedconv.commands.sensitivity import sensitivity as run
from tiedconv.conversion.calibrate import Calibration, Event, Measuring
from tiedconv.errors import UserError
from tiedconv.utils.plotting import check_picture

NAMED = 3  # matrices that the summary names at either end


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(sensitivity))


def sensitivity(
    model: common.Model,
    calib: Annotated[
        Path,
        typer.Option(
            metavar="IMAGES",
            help="A folder of images, with or without classes, or shards or hf:NAME. No label is "
            "looked at.",
        ),
    ],
    calib_images: common.CalibImages = 256,
    keep: Annotated[
        str, typer.Option(metavar="SHARE", help="The share of its parameters a matrix keeps.")
    ] = "50%",
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Also replace each matrix in turn and run the images."),
    ] = False,
    sort: Annotated[
        str, typer.Option(help="[b]order[/b] of the model, or [b]cost[/b]: the dearest first.")
    ] = "order",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A picture to draw: .png, .svg or .pdf.")
    ] = None,
    weights: common.Weights = "default",
    model_arg: common.ModelArg = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time with --measure.", min=1)] = 32,
    image_size: common.ImageSize = None,
    resize: common.Resize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    strict: common.Strict = False,
    device: common.Device = "auto",
    workers: common.Workers = None,
    seed: common.Seed = 0,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Say which matrices of a model are cheap to store with fewer numbers, and which dear.

    Each matrix alone is approximated by low rank as the images weigh it. What that leaves is told
    in nats: how far the model's answers would stray from the original's.
    """
    share = _share(keep)
    if sort not in ("order", "cost"):
        raise UserError(f"--sort {sort} is unknown", hint="Use order or cost")
    if output is not None:
        check_picture(output, force=force)
    change = common.preprocess_change(image_size, resize, mean, std, interpolation)
    with SensitivityBar("reading") as bar:
        config = CalibConfig(effort="fast", seed=seed)
        given = Calibration(calib, calib_images, config, device, workers, strict, on_event=bar)
        found = run(
            model, given, keep=share, measure=measure, weights=weights,
            model_args=common.model_args(model_arg), preprocess=change, batch_size=batch_size,
            seed=seed, on_measured=bar.measured,
        )  # fmt: skip
    shown = found
    if sort == "cost":
        rows = tuple(sorted(found.rows, key=_cost, reverse=True))
        shown = dataclasses.replace(found, rows=rows)
    if json_:
        common.print_json(shown)
    else:
        _show(shown)
    if output is not None:
        draw(found, output, force=force)
        hint(f"Drew {output}")


class SensitivityBar(Bar):
    """A bar that listens to the measuring of moments, then of answers."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Measuring):
            self.update(event.images, event.total, "images", "moments")

    def measured(self, done: int, total: int) -> None:
        """Images run through the model with each matrix replaced."""
        self.update(done, total, "images", "measuring")


def _share(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise UserError(
            f"--keep {text!r} is no share of a matrix",
            hint="Write it as 50%, or as 0.5: above 0 and below all",
        )
    return share


def _show(found: Sensitivity) -> None:
    measured = any(r.measured is not None for r in found.rows)
    columns = ["matrix", "parameters", "rank", "predicted nats"]
    columns += ["measured nats", "changed"] if measured else []
    columns.append("nats per million saved")
    title = (
        f"{found.model}: one matrix at a time at {100 * found.keep:g} % of its parameters, "
        f"{found.images:,} images"
    )
    common.show_table(columns, [_row(r, measured) for r in found.rows], title)
    say("")
    for line in _summary(found, measured):
        say(line)
    if found.skipped:
        say(render.skipped(found.skipped))


def _row(r: Sensed, measured: bool) -> list[str]:
    cells = [r.name, f"{r.parameters:,}", str(r.rank), _nats(r.predicted)]
    if measured:
        cells += [_nats(r.measured), "-" if r.changed is None else render.percent(r.changed)]
    return [*cells, _nats(r.per_million)]


def _cost(r: Sensed) -> float:
    cost = r.predicted if r.measured is None else r.measured
    return -1.0 if cost is None else cost


def _nats(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.3g}"


def _summary(found: Sensitivity, measured: bool) -> list[str]:
    names = found.by_price
    count = min(NAMED, (len(names) + 1) // 2)
    lines = [
        "nats: divergence of the answers from the original's, for each image."
        + (" changed: images whose first answer is another." if measured else ""),
    ]
    if names:
        lines.append(f"Cheapest for each parameter saved: {', '.join(names[:count])}.")
        lines.append(f"Dearest: {', '.join(names[::-1][:count])}.")
    agreement, ratio = found.rank_correlation, found.measured_to_predicted
    if agreement is not None and ratio is not None:
        lines.append(
            f"Prediction and measurement: rank correlation {agreement:.2f}, "
            f"measured/predicted {ratio:.2f} (median)."
        )
    return lines
