"""`tiedconv sensitivity`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import CALIBRATION, hint, option_in, say
from tiedconv.cli.option_groups import CalibOptions, ImageOptions, ReadingOptions
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.commands.sensitivity import Sensed, Sensitivity

NAMED = 3  # matrices that the summary names at either end


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        sensitivity,
        "tiedconv sensitivity resnet50 --calib PHOTOS -o heat.png",
        "tiedconv sensitivity resnet50 --calib PHOTOS --bits 3 --sort cost",
    )


def sensitivity(
    context: typer.Context,
    model: common.Model,
    *,
    calib: Annotated[
        Path,
        option_in(CALIBRATION, f"{common.CALIB_SOURCES} Labels are not used.", metavar="IMAGES"),
    ],
    keep: Annotated[
        str, typer.Option(metavar="FRACTION", help="Fraction of its parameters a matrix keeps.")
    ] = "50%",
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Round each matrix to integers of N bits (2 to 8) on average instead."
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also replace each matrix in turn and measure the divergence."
        ),
    ] = False,
    sort: Annotated[
        str,
        typer.Option(help="[b]order[/b] of the model, or [b]cost[/b]: most sensitive first."),
    ] = "order",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Draw a plot: .png, .svg or .pdf.")
    ] = None,
    weights: common.Weights = "default",
    reading: ReadingOptions,
    model_arg: common.ModelArg = None,
    batch_size: Annotated[int, typer.Option(help="Images per batch with --measure.", min=1)] = 32,
    images: ImageOptions,
    options: CalibOptions,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Rank a model's matrices by their sensitivity to compression.

    Each matrix alone is replaced by its best low-rank approximation on the calibration images, or
    with [b]--bits[/b] by its best integers.
    The cost is the expected KL divergence of the model's outputs from the original's, in nats.
    """
    from tiedconv.cli.progress import SensitivityBar
    from tiedconv.commands.sensitivity import sensitivity as run
    from tiedconv.commands.sensitivity_picture import draw
    from tiedconv.utils.plotting import check_picture

    fraction = _fraction(keep)
    if bits is not None and common.is_given(context, "keep"):
        raise UserError(
            "--keep and --bits were both given",
            "A matrix is rounded or made thin, not both",
            "Give one of them",
            code="options-conflict",
        )
    if sort not in ("order", "cost"):
        raise UserError(f"--sort {sort} is unknown", hint="Use order or cost", code="unknown-sort")
    if output is not None:
        check_picture(output, force=force)
    change = images.change()
    with SensitivityBar("reading") as bar:
        given = options.calibration(calib, bar, effort="fast")
        found = run(
            model, given, keep=fraction, bits=bits, measure=measure,
            weights=weights, reading=reading.reading(), model_args=common.model_args(model_arg),
            preprocess=change, batch_size=batch_size, seed=options.seed, on_measured=bar.measured,
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


def _fraction(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    fraction = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < fraction < 1:
        raise UserError(
            f"--keep {text!r} is not a fraction in (0, 1)",
            hint="Write it as 50%, or as 0.5",
            code="invalid-fraction",
        )
    return fraction


def _show(found: Sensitivity) -> None:
    measured = any(r.measured is not None for r in found.rows)
    columns = ["matrix", "parameters"] + ["rank"] * (found.bits is None) + ["predicted nats"]
    columns += ["measured nats", "changed"] if measured else []
    columns.append("nats per MB saved")
    title = f"{found.model}: one matrix at a time at {found.how}, {found.images:,} images"
    common.show_table(columns, [_row(r, measured) for r in found.rows], title)
    say("")
    for line in _summary(found, measured):
        say(line)
    if found.skipped:
        say(render.skipped(found.skipped))


def _row(r: Sensed, measured: bool) -> list[str]:
    rank = [] if r.rank is None else [str(r.rank)]
    cells = [r.name, f"{r.parameters:,}", *rank, _nats(r.predicted)]
    if measured:
        cells += [_nats(r.measured), "-" if r.changed is None else render.percent(r.changed)]
    return [*cells, _nats(r.per_megabyte)]


def _cost(r: Sensed) -> float:
    cost = r.predicted if r.measured is None else r.measured
    return -1.0 if cost is None else cost


def _nats(cost: float | None) -> str:
    return "-" if cost is None else f"{cost:.3g}"


def _summary(found: Sensitivity, measured: bool) -> list[str]:
    names = found.by_price
    count = min(NAMED, (len(names) + 1) // 2)
    lines = [
        "nats: KL divergence of the outputs from the original's, per image."
        + (" changed: images whose top-1 prediction changes." if measured else ""),
    ]
    if names:
        lines.append(f"Least sensitive per byte saved: {', '.join(names[:count])}.")
        lines.append(f"Most sensitive: {', '.join(names[::-1][:count])}.")
    agreement, ratio = found.rank_correlation, found.measured_to_predicted
    if agreement is not None and ratio is not None:
        lines.append(
            f"Prediction and measurement: rank correlation {agreement:.2f}, "
            f"measured/predicted {ratio:.2f} (median)."
        )
    return lines
