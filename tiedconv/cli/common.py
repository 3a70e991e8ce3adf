"""What commands share: errors to exit codes, common options, JSON.

Nothing in this folder imports torch when it is imported: help, completion and a mistyped command
need the signatures of the commands alone. What does the work is imported when a command runs.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.text import Text

from tiedconv.cli import render
from tiedconv.errors import UserError, printable

IMAGES = "Images"
"""The part of a command's help on how images are chosen and prepared."""


def option_in(
    panel: str,
    help: str,
    *names: str,
    metavar: str | None = None,
    min: int | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """An option in this part of the help; if no name is given, named after its variable.

    `choices` are completed by TAB; others are refused where the option is used.
    """
    return typer.Option(
        *names, help=help, rich_help_panel=panel, metavar=metavar, min=min,
        autocompletion=completed(*choices) if choices else None,
    )  # fmt: skip


def completed(*choices: str) -> Callable[[str], list[str]]:
    """What TAB completes an option's value to."""

    def matching(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return matching


def names_in(folder: str) -> list[str]:
    """Names of the schemes or formats of a folder: one module each, and none is imported."""
    path = Path(__file__).parents[1] / folder
    modules = (m.name for m in pkgutil.iter_modules([str(path)]))
    return sorted(name.replace("_", "-") for name in modules if not name.startswith("_"))


MODEL = "Model"
"""The part of a command's help on which model is opened, and with which weights."""

OUTPUT = "Output"
"""The part of a command's help on what it writes and prints."""

CALIBRATION = "Calibration"
"""The part of a command's help on the images that a model is calibrated on."""

Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the results as JSON on standard output.", rich_help_panel=OUTPUT
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", help="Replace the output if it exists.", rich_help_panel=OUTPUT),
]
ForceRestart = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace the output if it exists, and discard the state of an interrupted run.",
        rich_help_panel=OUTPUT,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        help="Allow a file to import and call the package.module:function that builds its model.",
        rich_help_panel=MODEL,
    ),
]
AllGroups = Annotated[
    bool,
    typer.Option(
        "--all-groups",
        help="One row per group, instead of one per kind of group.",
        rich_help_panel=OUTPUT,
    ),
]
Model = Annotated[
    str,
    typer.Argument(
        help="A torchvision model (resnet50, vit_b_16, ...); timm:NAME; hf:NAME or hf:FOLDER; "
        "package.module:function."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and of the choice of images.")]
MODEL_KWARGS = "--model-kwargs"
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        MODEL_KWARGS,
        metavar="NAME=VALUE",
        help="An argument of the model's constructor, such as img_size=32, or a .toml file of "
        "them. Repeatable; --model-kwargs takes several at once.",
        rich_help_panel=MODEL,
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        help="[b]default[/b] (the published weights), [b]none[/b] (random), or a file: "
        ".safetensors, .safetensors.index.json, or a .pth that contains only tensors; "
        "or published weights of torchvision by their name, such as IMAGENET1K_V1.",
        rich_help_panel=MODEL,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Processes that decode images; chosen automatically if not given.", min=0),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="IMAGES",
        help="A folder with train/ and val/ (or test/) of class folders, or class folders "
        "directly; tar shards: a folder of them, or a pattern such as "
        "'train-{000000..000147}.tar'; or hf:NAME, hf:NAME:CONFIG or hf:FOLDER. For a detector: "
        "a folder in COCO format.",
    ),
]
CALIB_SOURCES = (
    "A folder of images, with or without class folders, tar shards, hf:NAME, or [b]random[/b] "
    "(shapes at random, where there are no photos)."
)
Task = Annotated[
    str,
    option_in(
        IMAGES,
        "classification, detection, or [b]auto[/b] (from the data's annotations).",
        choices=("auto", "classification", "detection"),
    ),
]
OutputName = Annotated[
    str | None,
    option_in(
        IMAGES,
        "Use only these outputs, such as last_hidden_state; with commas between. Default: all.",
        metavar="NAMES",
    ),
]
Limit = Annotated[
    int | None, option_in(IMAGES, "Maximum number of images, spread evenly over the classes.")
]
ClassMap = Annotated[
    str | None,
    option_in(
        IMAGES,
        "Which output each class of the data is: [b]imagenet[/b]; a file with one name in each "
        "line, or JSON; or [b]position[/b]. Default: by name where both sides have names.",
        metavar="imagenet|FILE|position",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop at an unreadable image; by default it is skipped and counted.",
        rich_help_panel=IMAGES,
    ),
]  # fmt: skip

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether an option of a command was typed, rather than left at its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_without_images(context: typer.Context, *options: str) -> None:
    """UserError if any of these options of a command was given: it has no --calib."""
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in options and is_given(context, name):
            raise UserError(
                f"{parameter.opts[-1]} was given without --calib",
                "It has no effect without calibration images",
                "Add --calib IMAGES, or leave it out",
                code="needs-calib",
            )


def command_line() -> str:
    """The command as the user typed it, for a file's history.

    Without --resume: a resumed run ends with the bytes of one that was not interrupted. Of paths
    the last part alone: a file tells nothing of the machine it was made on.
    """
    words = (_without_folders(word) for word in sys.argv[1:] if word != "--resume")
    return shlex.join(["tiedconv", *words])


def _without_folders(word: str) -> str:
    """A word of a command line, a path in it cut to its last part; names on a hub are kept."""
    start, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    kind, colon, name = value.partition(":")
    if kind == "hf" and colon:
        is_path = name.startswith(("/", ".", "~", os.sep)) or Path(name).exists()
        return f"{start}{equals}hf:{Path(name).name if is_path else name}"
    return f"{start}{equals}{PurePath(value).name if os.sep in value else value}"


def say(text: str) -> None:
    """Plain text on standard output; only a terminal breaks its lines."""
    out.print(Text(shown(text)), soft_wrap=not out.is_terminal)


def shown(text: str) -> str:
    """Text as a terminal may show it: names in it may hold anything."""
    return "\n".join(map(printable, text.split("\n")))


def warn(text: str) -> None:
    """A line on standard error, if there is something to say."""
    if text:
        hint(text)


def hint(text: str) -> None:
    """A line of plain text on standard error."""
    err.print(Text(shown(text)), soft_wrap=True)


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
    """Figures as JSON; dataclasses become objects, NaN and infinities null."""
    from tiedconv.io.json_text import json_ready

    typer.echo(json.dumps(json_ready(data), indent=2, allow_nan=False))


def model_args(pairs: Sequence[str] | None) -> dict[str, Any]:
    """`["img_size=32"]` to `{"img_size": 32}`."""
    from tiedconv.sources import parse_model_args

    return dict(parse_model_args(pairs or []))
