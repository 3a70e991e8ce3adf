"""`tiedconv demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import hint, say


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(app, demo)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write to.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tenth of the training, to see that it runs.")
    ] = False,
    json_: common.Json = False,
) -> None:
    """Run the whole workflow offline, on scikit-learn's handwritten digits, in about two minutes.

    Trains a small ViT and a small bottleneck ResNet, converts each with three schemes, fine-tunes
    the results with the dense model as teacher, and writes the files, a table and a picture.
    """
    from tiedconv.cli.progress import Bar
    from tiedconv.commands.demo import run_demo

    with Bar("demo") as bar:
        seen: set[str] = set()

        def on_stage(done: float, total: float, what: str) -> None:
            if what not in seen:
                seen.add(what)
                bar.line(what)
            bar.update(round(done), round(total), what)

        done = run_demo(output, seed=seed, quick=quick, on_stage=on_stage)
    if json_:
        common.print_json(done)
        return
    columns = ("model", "parameters", "ratio", "file", "converted", "fine-tuned")
    rows = [
        (
            r.name,
            f"{r.parameters:,}",
            render.percent(r.ratio),
            render.size(r.file_bytes),
            render.accuracy(r.converted),
            render.accuracy(r.finetuned),
        )
        for r in done.rows
    ]
    title = f"top-1 on {done.test_images} test digits, {done.seconds:.0f} s in all"
    common.show_table(columns, rows, title)
    say(f"Files and {done.picture.name} are in {output}/")
    say(done.title)
    hint("Your own model, three commands:")
    hint("  tiedconv convert resnet50 --scheme auto --params 50% --calib IMAGES -o c.safetensors")
    hint("  tiedconv finetune c.safetensors --data IMAGES -o finetuned.safetensors --epochs 1")
    hint("  tiedconv report finetuned.safetensors")
