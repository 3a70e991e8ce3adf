"""`tiedconv bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import hint, say
from tiedconv.errors import UserError

if TYPE_CHECKING:
    from tiedconv.commands.bench import Bench, Measured, Timing


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        bench,
        "tiedconv bench compact.safetensors --runtime eager,onnx --batch-size 1,8",
    )


def bench(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Some of eager, compiled, onnx, openvino, executorch. Each is compared with the "
            "dense form in the same runtime.",
        ),
    ] = "eager,onnx",
    batch: Annotated[
        str, typer.Option("--batch-size", metavar="SIZES", help="Batch sizes.")
    ] = "1,8",
    rounds: Annotated[int, typer.Option(help="Runs of each form at each batch size.", min=3)] = 20,
    threads: Annotated[int, typer.Option(help="Threads of each runtime.", min=1)] = 1,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a plot: .png, .svg or .pdf.")
    ] = None,
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Benchmark a compact file against its dense form.

    Load time, memory, latency and throughput. Each form runs in its own process, and the runs are
    interleaved, so that background load affects all forms equally. A form that can't be measured is
    listed as left out; exit code 1 if nothing could be compared.
    """  # fmt: skip
    from tiedconv.cli.progress import Bar
    from tiedconv.commands.bench import bench as run
    from tiedconv.commands.bench import draw
    from tiedconv.utils.plotting import check_picture

    batches = _sizes(batch)
    names = [name.strip() for name in runtime.split(",") if name.strip()]
    if output is not None:
        check_picture(output, force=force)
    with Bar("measuring") as bar:
        found = run(
            file, runtimes=names, batches=batches, rounds=rounds, threads=threads,
            trust_code=trust_code, on_turn=lambda done, total: bar.update(done, total, "runs"),
        )  # fmt: skip
    if json_:
        common.print_json(found)
    else:
        _show(found)
    if output is not None:
        draw(found, output, force=force)
        hint(f"Wrote {output}")


def _sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"Invalid --batch-size {text!r}: not a list of integers",
            hint="Write it as 1,8,32",
            code="invalid-batch-sizes",
        ) from None


def _show(found: Bench) -> None:
    batches = [timing.batch for timing in found.rows[0].timings] if found.rows else []
    columns = ["runtime", "model", "load", "memory"]
    columns += [f"batch {b}" for b in batches] + ["img/s"]
    rows = [_row(row, found) for row in found.rows]
    plural = "thread" if found.threads == 1 else "threads"
    title = f"{found.file} on {found.device}, {found.threads} {plural}, {found.rounds} rounds"
    common.show_table(columns, rows, title, text=2)
    say("")
    say(
        "After a value: its ratio to the dense form in the same runtime, the median over the "
        "rounds and the middle 80 %. Memory is that of the loaded model, without the runtime "
        "itself."
    )
    for name, why in found.left_out:
        say(f"Left out: {name}. {why}.")


def _row(row: Measured, found: Bench) -> list[str]:
    from tiedconv.commands.bench import DENSE, ratio_to_dense

    load = f"{row.load_seconds:.2f} s"
    memory = render.size(row.held_bytes)
    ratio = ratio_to_dense(row, found, "held_bytes")
    if row.model != DENSE and ratio is not None:
        memory = f"{memory} {ratio:.2f}"
    cells = [row.runtime, row.model, load, memory, *map(_time, row.timings)]
    return [*cells, render.three_digits(max(t.images_per_second for t in row.timings))]


def _time(timing: Timing) -> str:
    text = f"{render.three_digits(timing.seconds * 1e3)} ms"
    if timing.ratio is None or timing.low is None or timing.high is None:
        return text
    return f"{text} {timing.ratio:.2f} ({timing.low:.2f}-{timing.high:.2f})"
