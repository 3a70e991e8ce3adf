"""`tiedconv convert`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import CALIBRATION, hint, option_in, say, warn
from tiedconv.cli.option_groups import CalibOptions, ImageOptions, ReadingOptions
from tiedconv.cli.recipe_options import SIZE, SpeedOptions, make_recipe

if TYPE_CHECKING:
    from tiedconv.commands.convert_file import Conversion
    from tiedconv.commands.report import Report
    from tiedconv.conversion.calibrate import Calibration
    from tiedconv.planning.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        convert,
        "tiedconv convert resnet50 --bytes 10% --calib PHOTOS",
        "tiedconv convert timm:vit_tiny_patch16_224 --scheme tied --weights FILE.safetensors",
        "tiedconv convert hf:FOLDER --params 50% --calib PHOTOS --effort fast -o small.safetensors",
        "tiedconv convert resnet50 --scheme lors --params 50% --dry-run",
        "tiedconv convert vit_b_16 --latency 0.6x --on onnx --calib PHOTOS",
    )


BATCH_SIZE = 64
"""The default of `CalibConfig`, which can't be imported without torch."""

CALIB_OPTIONS = CalibOptions(calib_images=1024)

FEW_IMAGES = 100
"""By benchmarks/calib_images.py: 128 are within half a point of 2,048, and 32 lose two or more."""


def convert(
    context: typer.Context,
    model: common.Model,
    *,
    scheme: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(common.names_in('schemes'))}. Default: auto, which chooses for each "
            "block.",
            autocompletion=common.completed(*common.names_in("schemes")),
            rich_help_panel=SIZE,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file to write; default MODEL-SCHEME.safetensors.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="Choose ranks to fit a parameter budget: 50% or 12M. Scheme auto without a "
            "budget: 50%.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="BUDGET",
            help="Store weights as integers, as coarse as a budget of bytes asks for: 10% of the "
            "original's bytes, 700kB or 2MB.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="With --bytes: the most bits of an integer, or least:most (4:8).",
            rich_help_panel=SIZE,
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            help="Rank of the residuals (for lowrank: of the matrices): an integer such as 16, or "
            "a fraction of each matrix's parameters such as 0.2. --params, --macs and --latency "
            "choose it.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="A scheme option, such as groups=all (see docs/schemes.md). Repeatable.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Convert only tensors whose name matches. Repeatable.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Convert no tensor whose name matches. Repeatable.",
            rich_help_panel=SIZE,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", help="Rules and budget from a file.", rich_help_panel=SIZE
        ),
    ] = None,
    speed: SpeedOptions,
    weights: common.Weights = "default",
    reading: ReadingOptions,
    model_arg: common.ModelArg = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan without loading weights. Exact, except for the schemes and ranks "
            "that a budget will choose.",
            rich_help_panel=common.OUTPUT,
        ),
    ] = False,
    all_groups: common.AllGroups = False,
    images: ImageOptions,
    calib: Annotated[
        Path | None,
        option_in(
            CALIBRATION,
            f"{common.CALIB_SOURCES} Minimise the change of the outputs on them; labels are not "
            "used.",
            metavar="IMAGES",
        ),
    ] = None,
    effort: Annotated[
        str,
        option_in(
            CALIBRATION,
            "[b]fast[/b]: fit the weights in the error that the images define. [b]normal[/b]: "
            "then train block by block, and end to end. [b]thorough[/b]: end to end for longer.",
            choices=("fast", "normal", "thorough"),
        ),
    ] = "normal",
    batch_size: Annotated[
        int, option_in(CALIBRATION, "Images per calibration step; fewer take less memory.", min=1)
    ] = BATCH_SIZE,
    resume: Annotated[
        bool, option_in(CALIBRATION, "Resume an interrupted calibration.", "--resume")
    ] = False,
    options: CalibOptions = CALIB_OPTIONS,
    force: common.ForceRestart = False,
    json_: common.Json = False,
) -> None:
    """Convert a pretrained model to a compact file that stores far fewer parameters.

    Weights are shared between layers as the scheme describes, and fitted to the original ones.
    With [b]--calib[/b] the result is usually accurate without training; without images it may
    need [b]tiedconv finetune[/b] to be of use.
    """
    from tiedconv.cli.progress import ConvertBar
    from tiedconv.utils.stage import listening

    if calib is None:
        common.refuse_without_images(
            context, "calib_images", "effort", "batch_size", "resume", "strict", "output_name"
        )
    wanted = make_recipe(scheme, params, size, bits, speed, rank, option, include, exclude, recipe)
    change = images.change()
    with ConvertBar(batch_size) as bar, listening(bar.stage):
        given: Calibration | None = None
        if calib is not None:
            given = options.calibration(
                calib, bar, resume=resume, effort=effort, batch_size=batch_size
            )
        target = None if dry_run else (output or default_output(model, wanted))
        done = _interruptible(
            model,
            wanted,
            target,
            weights=weights,
            reading=reading.reading(),
            model_args=common.model_args(model_arg),
            preprocess=change,
            force=force,
            seed=options.seed,
            command=common.command_line(),
            calib=given,
            on_group=bar.groups,
            on_site=bar.sites,
            on_rehearsal=bar.rehearsal,
        )
    if json_:
        common.print_json(_figures(done))
    else:
        budget = wanted.budget is not None or wanted.work is not None
        sized = wanted.bytes is not None
        _show(
            done, each=all_groups, budget=budget, sized=sized, weights=weights, calib=calib
        )  # fmt: skip


def _interruptible(
    model: str, recipe: Recipe, output: Path | None, calib: Calibration | None, **options: Any
) -> Conversion:  # fmt: skip
    """`convert_file`, which also reports what an interruption keeps and a resume finds."""
    from tiedconv.commands.convert_file import convert_file
    from tiedconv.io.run_dir import RunDir

    kept = None if output is None else RunDir.beside(output)
    if kept is not None and calib is not None and calib.resume and not kept.kept():
        hint(f"No interrupted calibration in {kept.path}: starting from the beginning.")
    try:
        return convert_file(model, recipe, output, calib=calib, own_process=True, **options)
    except KeyboardInterrupt:
        if kept is not None and kept.kept():
            hint("Finished blocks are kept: run the same command with --resume to continue.")
        raise


def default_output(model: str, recipe: Recipe) -> Path:
    """A file in this folder, named after the model and the scheme."""
    kind, _, name = model.partition(":")
    if kind == "hf" and Path(name).is_dir():
        model = Path(name).resolve().name
    stem = re.sub(r"[^\w.-]+", "-", model).strip("-")
    return Path(f"{stem}-{recipe.rules[0].scheme}.safetensors")


def _report(done: Conversion) -> Report:
    from tiedconv.commands.report import plan_report, report_of

    if done.written:
        return report_of(done.written)
    return plan_report(done.plan, done.spec, done.macs)


def _figures(done: Conversion) -> dict[str, Any]:
    figures = _report(done)
    return {
        "model": done.spec,
        "output": done.path,
        "original": done.plan.original,
        "stored": done.plan.stored,
        "ratio": done.plan.stored / done.plan.original,
        "file_bytes": done.size,
        "fit_seconds": round(done.seconds, 3),
        "original_bytes": figures.original_bytes,
        "macs": figures.macs,
        "latency": done.latency,
        "integers": figures.integers,
        "rounding": done.record.get("rounding"),
        "calibration": done.calibration,
        "weights_part": done.source.weights_part,
        "symmetries": done.record.get("symmetries"),
        "groups": list(figures.groups),
        "smaller": [{"how": how, "stored": stored} for how, stored in done.smaller],
    }


def next_command(done: Conversion, weights: str, calib: Path | None) -> list[str]:
    """What to run after a conversion, as it runs: a distillation on the same images, or a check.

    Args:
        done: a conversion that wrote a file.
        weights: of `--weights`.
        calib: the images; None without any.
    """
    assert done.path is not None
    spec, file = done.spec, str(done.path)
    trust = ["--trust-code"] if ":" in spec and not spec.startswith(("timm:", "hf:")) else []
    if calib is None or weights == "none" or (done.calibration or {}).get("random"):
        return ["tiedconv", "verify", file, *trust]
    # A file's own word for a folder, a repository or a function is not followed unasked.
    named = spec if spec.startswith("hf:") or trust else None
    teacher = named if weights == "default" else weights
    return [
        "tiedconv", "finetune", file, "--data", str(calib), "--unlabelled", "--distill", "1",
        *(["--teacher", teacher] if teacher else []), *trust,
        "-o", str(done.path.with_name(f"{done.path.stem}-finetuned.safetensors")),
    ]  # fmt: skip


def _show(
    done: Conversion, *, each: bool, budget: bool, sized: bool, weights: str, calib: Path | None
) -> None:
    figures = _report(done)
    rows = [*render.group_rows(figures, each=each), render.kept_row(figures)]
    common.show_groups([*rows, render.total_row(figures)])
    saved = 1 - figures.ratio
    gain = f", which saves {render.percent(saved)}" if saved > 0 else ", which saves nothing"
    gain = "" if figures.integers and saved <= 0 else gain  # their bytes do
    say(
        f"{done.spec}: {figures.original:,} parameters become {figures.stored:,} "
        f"({render.percent(figures.ratio)}){gain}. {render.work(figures)}"
    )
    if figures.integers:
        say(render.precision(figures))
    elif saved <= 0 and not sized:
        hint("Lower the ranks (or the number of bases), or let --params choose them.")
    if done.latency:
        say(render.latency(done.latency))
    say(render.LEGEND)
    if sized and not done.path:
        say(
            "How many parameters to share, and the bits of each weight, are chosen by the weights "
            "and the images of --calib; here nothing is shared or rounded yet."
        )
    elif budget and not done.path:
        say(
            "This is an estimate: the budget holds, but schemes and ranks depend on the weights, "
            "and on the images of --calib. Here each group is given the same ratio."
        )
    say(render.preparation(done.source.preprocess))
    if done.source.preprocess is not None:
        warn(render.other_size(done.native_size, done.source.preprocess.size))
    if done.source.weights_part:
        say(render.weights_part(done.source))
    if done.path and any(group.error is not None for group in figures.groups):
        say(render.FIT_ERROR_ON_IMAGES if done.calibration else render.FIT_ERROR)
    for line in render.symmetry_lines(done.record):
        say(line)
    if done.calibration:
        say(render.calibrated(done.calibration))
        if done.calibration["images"] < FEW_IMAGES:
            hint(
                f"{render.counted(done.calibration['images'], 'image')} are few: use about "
                f"{FEW_IMAGES} for --effort fast, 1,000 for normal. They need no labels."
            )
    if done.smaller:
        say("\nSmaller options (need more fine-tuning):")
        for how, stored in done.smaller:
            say(f"  {stored:>13,}  {render.percent(stored / figures.original):>6}  {how}")
        if any("lors" in how and stored < 0.5 * figures.original for how, stored in done.smaller):
            say("  Or choose ranks for a budget: --scheme lors --params 50%")
    if done.path:
        took = f"fitted in {done.seconds:.1f} s"
        say(f"Wrote {done.path} ({render.against_original(figures)}; {took}).")
        if not done.calibration:
            hint(
                "Nothing was calibrated: no photo was seen, so answers may differ from the "
                "original's, the more the smaller the file. Photos without labels help most: "
                "--calib PHOTOS, about 256 of them; for want of any: --calib random --effort fast."
            )
        elif done.calibration.get("random"):
            hint(
                "No photo was seen: answers for photos may differ more than those for random "
                "images do. Some photos without labels help most: --calib PHOTOS."
            )
        hint(f"Next: {shlex.join(next_command(done, weights, calib))}")
    else:
        hint("Nothing was written: this was a dry run.")
