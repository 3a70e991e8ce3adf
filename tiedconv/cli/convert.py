"""`tiedconv convert`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from tiedconv.calibration import CalibConfig
from tiedconv.cli import common, render
from tiedconv.cli.common import hint, say
from tiedconv.cli.progress import ConvertBar
from tiedconv.commands.convert import Conversion, convert_file
from tiedconv.commands.report import plan_report, report
from tiedconv.conversion.calibrate import Calibration
from tiedconv.errors import UserError
from tiedconv.io.run_dir import RunDir
from tiedconv.planning.recipe import Budget, Recipe, Rule
from tiedconv.schemes import all_schemes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(convert))


FEW_IMAGES = 100
"""By benchmarks/calib_images.py: 128 are within half a point of 2,048, and 32 lose two or more."""


def convert(
    context: typer.Context,
    model: common.Model,
    scheme: Annotated[
        str | None, typer.Option(help=f"{', '.join(all_schemes())}; tied if not given.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The file to write; if not given, MODEL-SCHEME.safetensors."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(metavar="BUDGET", help="Choose ranks to store 50% of the parameters, or 12M."),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the residuals (of lowrank: of the matrix): 16, or a share of its "
            "parameters such as 0.2. --params chooses it."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="An option of the scheme, such as groups=all (docs/schemes.md). Repeatable.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only tensors whose name matches. Repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="No tensor whose name matches. Repeatable."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Rules and budget from a file.")
    ] = None,
    weights: common.Weights = "default",
    model_arg: common.ModelArg = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan; needs no weights. Exact, but for what --params will choose.",
        ),
    ] = False,
    all_groups: Annotated[
        bool, typer.Option("--all-groups", help="A line for each group, not for each kind.")
    ] = False,
    image_size: common.ImageSize = None,
    resize: common.Resize = None,
    mean: common.Mean = None,
    std: common.Std = None,
    interpolation: common.Interpolation = None,
    calib: common.Calib = None,
    calib_images: common.CalibImages = 1024,
    effort: Annotated[
        str,
        typer.Option(
            help="What is done with the images. [b]fast[/b]: fit in the metric they give. "
            "[b]normal[/b]: then fit block by block, and the whole. [b]thorough[/b]: longer."
        ),
    ] = "normal",
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Images of [b]--calib[/b] at a time; fewer take less memory."),
    ] = CalibConfig.batch_size,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted calibration.")
    ] = False,
    strict: common.Strict = False,
    device: common.Device = "auto",
    workers: common.Workers = None,
    seed: common.Seed = 0,
    force: common.ForceAnew = False,
    json_: common.Json = False,
) -> None:
    """Rewrite a pretrained model so that far fewer numbers are stored.

    It loads the model, plans what is shared, fits it to the weights, and writes one compact,
    self-describing file. With [b]--calib[/b] the result works at once; without images it may
    not. Heal it afterwards with [b]tiedconv finetune[/b].
    """
    if calib is None:
        common.refuse_without_images(
            context, "calib_images", "effort", "batch_size", "resume", "strict"
        )
    wanted = make_recipe(scheme, params, rank, option, include, exclude, recipe)
    change = common.preprocess_change(image_size, resize, mean, std, interpolation)
    with ConvertBar("fitting") as bar:
        given: Calibration | None = None
        if calib is not None:
            config = CalibConfig(effort=effort, batch_size=batch_size, seed=seed)
            given = Calibration(
                calib, calib_images, config, device, workers, strict, resume=resume, on_event=bar
            )
        target = None if dry_run else (output or default_output(model, wanted))
        done = _interruptible(
            model,
            wanted,
            target,
            weights=weights,
            model_args=common.model_args(model_arg),
            preprocess=change,
            force=force,
            seed=seed,
            command=common.command_line(),
            calib=given,
            on_group=bar.groups,
        )
    if json_:
        common.print_json(_figures(done))
    else:
        _show(done, each=all_groups, budget=wanted.budget is not None)


def _interruptible(
    model: str, recipe: Recipe, output: Path | None, calib: Calibration | None, **options: Any
) -> Conversion:  # fmt: skip
    """`convert_file`, with word of what an interruption leaves behind and a resume finds."""
    kept = None if output is None else RunDir.beside(output)
    if kept is not None and calib is not None and calib.resume and not kept.kept():
        hint(f"Nothing is kept in {kept.path}: the calibration begins anew.")
    try:
        return convert_file(model, recipe, output, calib=calib, **options)
    except KeyboardInterrupt:
        if kept is not None and kept.kept():
            hint("What is done is kept: the same command with --resume goes on.")
        raise


def default_output(model: str, recipe: Recipe) -> Path:
    """A file in this folder, named after the model and the scheme."""
    kind, _, name = model.partition(":")
    if kind == "hf" and Path(name).is_dir():
        model = Path(name).resolve().name
    stem = re.sub(r"[^\w.-]+", "-", model).strip("-")
    return Path(f"{stem}-{recipe.rules[0].scheme}.safetensors")


def make_recipe(
    scheme: str | None,
    params: str | None,
    rank: str | None,
    option: list[str] | None,
    include: list[str] | None,
    exclude: list[str] | None,
    file: Path | None,
) -> Recipe:
    """The recipe that the options say; a budget may be added to a file's."""
    if file is not None:
        if scheme or rank or option or include or exclude:
            raise UserError(
                "A recipe file and --scheme, --rank, --option, --include or --exclude were given",
                "They would contradict each other",
                "Write them into the file's rules",
            )
        read = Recipe.from_toml(file)
        return read if params is None else Recipe(read.rules, Budget(params)).asked()
    options = {**_options(option), **({} if rank is None else {"rank": _rank(rank)})}
    rule = Rule(scheme or "tied", options, tuple(include or ["*"]), tuple(exclude or []))
    return Recipe((rule,), None if params is None else Budget(params)).asked()


def _options(pairs: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(
                f"--option {pair!r} has no value", hint="Write it as --option groups=all"
            )
        options[name] = _value(value)
    return options


def _rank(text: str) -> Any:
    rank = _value(text)
    if isinstance(rank, float) and rank > 1:
        raise UserError(
            f"--rank {text} is neither a whole number nor a share below 1",
            hint="Write it as --rank 16, or as --rank 0.2 for a share of each matrix",
        )
    return rank


def _value(text: str) -> Any:
    """A number, truth or list where the text is one, else the text."""
    try:
        return json.loads(f"[{text}]" if "," in text and not text.startswith("[") else text)
    except json.JSONDecodeError:
        return text


def _figures(done: Conversion) -> dict[str, Any]:
    figures = report(done.path) if done.path else plan_report(done.plan, done.spec)
    return {
        "model": done.spec,
        "output": done.path,
        "original": done.plan.original,
        "stored": done.plan.stored,
        "ratio": done.plan.stored / done.plan.original,
        "file_bytes": done.size,
        "fit_seconds": round(done.seconds, 3),
        "calibration": done.calibration,
        "groups": list(figures.groups),
        "smaller": [{"how": how, "stored": stored} for how, stored in done.ways],
    }


def _show(done: Conversion, *, each: bool, budget: bool) -> None:
    figures = report(done.path) if done.path else plan_report(done.plan, done.spec)
    rows = [*render.group_rows(figures, each=each), render.kept_row(figures)]
    common.show_groups([*rows, render.total_row(figures)])
    saved = 1 - figures.ratio
    gain = f"saves {render.percent(saved)}" if saved > 0 else "saves nothing"
    say(
        f"{done.spec}: {figures.original:,} parameters become {figures.stored:,} "
        f"({render.percent(figures.ratio)}), which {gain}. {render.work(figures)}"
    )
    if saved <= 0:
        hint("Lower the ranks (or the number of bases), or let --params choose them.")
    say(render.LEGEND)
    if budget and not done.path:
        say(
            "This is a sketch: the budget holds, but schemes and ranks are chosen by the weights, "
            "and by the images of --calib. Here each group has an even share."
        )
    if done.path:
        say(render.FIT_ERROR_ON_IMAGES if done.calibration else render.FIT_ERROR)
    if done.calibration:
        say(render.calibrated(done.calibration))
        if done.calibration["images"] < FEW_IMAGES:
            hint(
                f"{render.counted(done.calibration['images'], 'image')}, which is few: --effort "
                f"fast wants some {FEW_IMAGES}, normal ten times as many. They need no labels."
            )
    if done.ways:
        say("\nWhat would save more (the less is stored, the more healing it needs):")
        for how, stored in done.ways:
            say(f"  {stored:>13,}  {render.percent(stored / figures.original):>6}  {how}")
        if any("lors" in how and stored < 0.5 * figures.original for how, stored in done.ways):
            say("  Or let ranks fill a budget: --scheme lors --params 50%")
    if done.path:
        say(f"Wrote {done.path} ({render.size(done.size)}, fitted in {done.seconds:.1f} s).")
        hint(f"Next: tiedconv finetune {done.path} --data IMAGES -o healed.safetensors")
    else:
        hint("Nothing was written: this was a dry run.")
