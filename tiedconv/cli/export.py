"""`tiedconv export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.common import say
from tiedconv.commands.export import Exported
from tiedconv.commands.export import export as run
from tiedconv.exporters import DTYPES, LOWERINGS, all_formats


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(common.guarded(export))


def export(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write. Its ending may say the format."),
    ],
    to: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(all_formats())}; if not given, as the ending says."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help=f"How matrices and kernels are stored: {', '.join(DTYPES)}.")
    ] = "float32",
    lower: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(LOWERINGS)}: for ONNX, apply factors one by one where that is as "
            "fast, wherever it can be done (least memory), or nowhere."
        ),
    ] = "auto",
    opset: Annotated[int | None, typer.Option(help="Of ONNX; chosen if not given.")] = None,
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Write a compact model in a form that needs no tiedconv.

    ONNX, OpenVINO and torch's pt2 hold each stored tensor once; the size is checked, and the file
    is run once and compared, before it takes its place. The dense form is the original's plain
    state dict, at the original's size.
    """
    done = run(
        file, output, to, dtype=dtype, lower=lower, opset=opset, trust_code=trust_code, force=force
    )
    if json_:
        common.print_json(done)
        return
    say(
        f"Wrote {done.path} ({render.size(done.size)}): {done.tensors} tensors, "
        f"{done.parameters:,} numbers."
    )
    for line in _facts(done):
        say(line)


def _facts(done: Exported) -> list[str]:
    lines = []
    if done.format != "dense":
        times = done.weight_bytes / done.stored_bytes
        lines.append(f"Its tensors take {times:.3f} times the bytes stored for them.")
    if done.difference is not None:
        lines.append(f"Run on random images, its logits are off by {done.difference:.1e}.")
    elif done.format != "dense":
        lines.append("It was not run: nothing here can, or the model takes no images.")
    if done.facts.get("one_copy"):
        lines.append(
            "Some matrices are read both ways. For one copy of them in memory, set ONNX Runtime's "
            "session.disable_prepacking to 1; it takes about a tenth more time."
        )
    return lines
