"""`tiedconv bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import hint, say
from tiedconv.cli.progress import Bar
from tiedconv.commands.bench import DENSE, Bench, Measured, Timing, draw, share_of_dense
from tiedconv.commands.bench import bench as run
from tiedconv.errors import UserError
from tiedconv.utils.plotting import check_picture


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(bench))


def bench(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Some of eager, compiled, onnx. Each is compared with the dense "
            "form in the same runtime.",
        ),
    ] = "eager,onnx",
    batch: Annotated[str, typer.Option(metavar="SIZES", help="Images at a time.")] = "1,8",
    rounds: Annotated[int, typer.Option(help="Turns for each batch size.", min=3)] = 20,
    threads: Annotated[int, typer.Option(help="Of each runtime.", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A picture: .png, .svg or .pdf.")
    ] = None,
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Measure what a compact file costs to run, beside its dense form.

    Load time, memory, latency and throughput; each form runs in a process of its own, and they take
    turns, so that ratios hold on a busy machine too.
    """  # fmt: skip
    batches = _sizes(batch)
    names = [name.strip() for name in runtime.split(",") if name.strip()]
    if output is not None:
        check_picture(output, force=force)
    with Bar("measuring") as bar:
        found = run(
            file, runtimes=names, batches=batches, rounds=rounds, threads=threads,
            trust_code=trust_code, on_turn=lambda done, total: bar.update(done, total, "turns"),
        )  # fmt: skip
    if json_:
        common.print_json(found)
    else:
        _show(found)
    if output is not None:
        draw(found, output, force=force)
        hint(f"Drew {output}")


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--batch {text!r} is no list of sizes", hint="Write it as 1,8,32"
        ) from None


def _show(found: Bench) -> None:
    batches = [timing.batch for timing in found.rows[0].timings] if found.rows else []
    columns = ["runtime", "model", "load", "memory"]
    columns += [f"batch {b}" for b in batches] + ["images/s"]
    rows = [_row(row, found) for row in found.rows]
    plural = "thread" if found.threads == 1 else "threads"
    title = f"{found.file} on {found.device}, {found.threads} {plural}, {found.rounds} rounds"
    common.show_table(columns, rows, title, text=2)
    say("")
    say(
        "In brackets: share of the dense form in the same runtime, median of turns and the middle "
        "80 %. Memory is what the loaded model holds, the runtime itself left out."
    )
    for name, why in found.left_out:
        say(f"Left out: {name}. {why}.")


def _row(row: Measured, found: Bench) -> list[str]:
    load = f"{row.load_seconds:.2f} s"
    memory = render.size(row.held_bytes)
    if row.model != DENSE:
        load += f" ({share_of_dense(row, found, 'load_seconds'):.2f})"
        memory += f" ({share_of_dense(row, found, 'held_bytes'):.2f})"
    cells = [row.runtime, row.model, load, memory, *map(_time, row.timings)]
    return [*cells, f"{max(t.images_per_second for t in row.timings):.1f}"]


def _time(timing: Timing) -> str:
    text = f"{timing.seconds * 1e3:.1f} ms"
    if timing.ratio is None or timing.low is None or timing.high is None:
        return text
    return f"{text} ({timing.ratio:.2f}, {timing.low:.2f}-{timing.high:.2f})"
