"""What commands share: errors to exit codes, common options, JSON."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from tiedconv.cli import render
from tiedconv.errors import CheckpointError, OutputError, TiedconvError, UserError
from tiedconv.io.json_text import json_ready
from tiedconv.sources import Preprocess, parse_model_args
from tiedconv.training import rank_in_environment, sigterm_as_keyboard_interrupt

P = ParamSpec("P")

IMAGES = "Images"
"""The part of a command's help that tells how images are chosen and prepared."""


def option_in(panel: str, help: str, *names: str, metavar: str | None = None) -> Any:
    """An option that stands in this part of the help; named after its variable if no name is."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar)


Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON on standard output.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
ForceAnew = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace the output if it exists, and begin anew where a run was interrupted.",
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="Let the file name a package.module:function that builds its model."
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        help="resnet50, vit_b_16, ... of torchvision; timm:NAME; hf:NAME or hf:FOLDER; "
        "package.module:function."
    ),
]
Seed = Annotated[int, typer.Option(help="Of random weights, and of which images are taken.")]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="NAME=VALUE",
        help="An argument of the model's constructor, such as img_size=32. Repeatable.",
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        help="[b]default[/b] (the published ones), [b]none[/b] (random), or a file: "
        ".safetensors, .safetensors.index.json, or a .pth that holds tensors alone.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Workers = Annotated[
    int | None, typer.Option(help="DistContext that decode images; chosen if not given.", min=0)
]
Data = Annotated[
    str,
    typer.Option(
        metavar="IMAGES",
        help="A folder with train/ and val/ (or test/) of class folders, or class folders "
        "directly; tar shards: a folder of them, or a pattern such as "
        "'train-{000000..000147}.tar'; or hf:NAME, hf:NAME:CONFIG or hf:FOLDER. For a detector: "
        "a folder in COCO's form.",
    ),
]
Calib = Annotated[
    Path | None,
    typer.Option(
        metavar="IMAGES",
        help="A folder of images, with or without classes, or shards or hf:NAME as for finetune: "
        "convert by what the model does to them. No label is looked at.",
    ),
]
CalibImages = Annotated[
    int, typer.Option("-n", "--calib-images", help="At most so many of them.", min=2)
]
Task = Annotated[
    str,
    option_in(IMAGES, "classification, detection, or [b]auto[/b]: what the data are for."),
]
Limit = Annotated[
    int | None, option_in(IMAGES, "At most so many images, spread evenly over the classes.")
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="A broken image is an error; else it is skipped, counted.",
        rich_help_panel=IMAGES,
    ),
]  # fmt: skip
ImageSize = Annotated[
    int | None, typer.Option(help="Side of the input in pixels.", min=1, rich_help_panel=IMAGES)
]
Resize = Annotated[
    int | None,
    typer.Option(
        help="Shorter side before the centre crop; 0 for no crop.", min=0, rich_help_panel=IMAGES
    ),
]
Mean = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="Mean of each channel, 0 to 1.", rich_help_panel=IMAGES
    ),
]  # fmt: skip
Std = Annotated[
    str | None,
    typer.Option(
        metavar="R,G,B", help="Standard deviation of each channel.", rich_help_panel=IMAGES
    ),
]  # fmt: skip
Interpolation = Annotated[str | None, option_in(IMAGES, "bilinear or bicubic.")]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def guarded(function: Callable[P, None]) -> Callable[P, None]:
    """A command whose known errors become one line on standard error and an exit code."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with sigterm_as_keyboard_interrupt(), _heard():
                function(*args, **kwargs)
        except TiedconvError as error:
            # Of several processes all find what is wrong with a command, and one says it.
            rank = rank_in_environment()
            if rank == 0 or not isinstance(error, UserError | CheckpointError | OutputError):
                who = f" (process {rank})" if rank else ""
                # Through typer.echo rather than Rich: one line, neither wrapped nor marked up.
                code = typer.style(f"[{error.code}]", dim=True)
                typer.echo(f"error{who}: {error} {code}", err=True)
            else:
                time.sleep(2)  # a launcher ends all when one ends, so let the first say it
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            if rank_in_environment() == 0:
                typer.echo("Interrupted. Nothing half-written was left behind.", err=True)
            raise typer.Exit(128 + getattr(interrupt, "signum", signal.SIGINT)) from None

    return run


class _Hints(logging.Handler):
    """Prints what the library has to say of its work."""

    def emit(self, record: logging.LogRecord) -> None:
        if rank_in_environment() == 0:
            hint(record.getMessage())


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    logger, handler = logging.getLogger("tiedconv"), _Hints()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def refuse_without_images(context: typer.Context, *options: str) -> None:
    """UserError if any of these options of a command was given: it has no --calib."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name) if name in options else None
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(
                f"{parameter.opts[-1]} was given without --calib",
                "It says what is done with images, and there are none",
                "Add --calib IMAGES, or leave it out",
            )


def command_line() -> str:
    """The command as the user typed it, for a file's history.

    Without --resume: a resumed run ends with the bytes of one that was not interrupted.
    """
    return shlex.join(["tiedconv", *(word for word in sys.argv[1:] if word != "--resume")])


def say(text: str) -> None:
    """Plain text on standard output; only a terminal breaks its lines."""
    out.print(Text(text), soft_wrap=not out.is_terminal)


def hint(text: str) -> None:
    """A line of plain text on standard error."""
    err.print(Text(text), soft_wrap=True)


def show_table(
    columns: Sequence[str],
    rows: Sequence[render.Row],
    title: str = "",
    text: int = 1,
    total: bool = False,
) -> None:
    """A table on standard output; see `render.table`. A narrow terminal gets fewer columns."""
    if title:
        out.print(Text(title, style="bold"), soft_wrap=True)
    made = render.table(columns, rows, text, total)
    if not out.is_terminal:  # a file or a pipe is as wide as need be
        out.width = max(
            out.width, Measurement.get(out, out.options.update(width=9999), made).maximum
        )
    out.print(made)


def show_groups(rows: Sequence[render.Row], title: str = "") -> None:
    """The table of a report's groups, the last two rows of which are what was kept and all."""
    room = out.width if out.is_terminal else None
    start, rows = render.without_common_start(rows)
    if start:
        place = f"within {start.rstrip('.')}"
        title = f"{title} ({place})" if title else f"{place}:"
    columns, cells = render.fitting(render.GROUP_COLUMNS, rows, room)
    show_table(columns, cells, title, sum(c in render.GROUP_COLUMNS[:2] for c in columns), True)


def print_json(data: Any) -> None:
    """Figures as JSON; dataclasses become objects, and what is no finite number null."""
    typer.echo(json.dumps(json_ready(data), indent=2, allow_nan=False))


def model_args(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["img_size=32"]` to `{"img_size": 32}`."""
    return dict(parse_model_args(pairs or []))


def preprocess_change(
    image_size: int | None,
    resize: int | None,
    mean: str | None,
    std: str | None,
    interpolation: str | None,
) -> Callable[[Preprocess], Preprocess] | None:
    """What the image options change of a model's own preprocessing; None if nothing."""
    if all(option is None for option in (image_size, resize, mean, std, interpolation)):
        return None
    means, stds = _numbers("--mean", mean), _numbers("--std", std)
    if interpolation not in (None, "bilinear", "bicubic"):
        raise UserError(
            f"--interpolation {interpolation} is unknown", hint="Use bilinear or bicubic"
        )

    def change(own: Preprocess) -> Preprocess:
        own = own.scaled_to(image_size)
        mean_, std_ = means or own.mean, stds or own.std
        channels = max(len(mean_), len(std_))  # one number stands for all channels
        return Preprocess(
            own.size,
            own.resize if resize is None else (resize or None),
            mean_ * channels if len(mean_) == 1 else mean_,
            std_ * channels if len(std_) == 1 else std_,
            interpolation or own.interpolation,
        )

    return change


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) not in (1, 3) or not all(map(math.isfinite, values)):
        raise UserError(
            f"{option} {text!r} is not one number for each channel",
            hint=f"Write it as {option} 0.485,0.456,0.406",
        )
    least = min(values)
    if max(values) > 1 or least < 0 or (option == "--std" and least == 0):
        raise UserError(
            f"{option} {text} is not between 0 and 1",
            "Pixels are numbers from 0 to 1",
            "Divide figures that are meant for 0 to 255 by 255" if max(values) > 1 else "",
        )
    return values
