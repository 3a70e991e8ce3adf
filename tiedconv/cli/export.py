"""`tiedconv export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiedconv.cli import common, render
from tiedconv.cli.command import add
from tiedconv.cli.common import say

if TYPE_CHECKING:
    from tiedconv.commands.export import Exported


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(
        app,
        export,
        "tiedconv export compact.safetensors -o model.onnx",
        "tiedconv export compact.safetensors --to dense -o dense.safetensors",
    )


def export(
    file: Annotated[Path, typer.Argument(help="A compact file.")],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="The file to write; its extension gives the format."),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(common.names_in('exporters'))}; by default, by the extension.",
            autocompletion=common.completed(*common.names_in("exporters")),
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of stored matrices and kernels: float32, float16, bfloat16, int8."
        ),
    ] = "float32",
    lower: Annotated[
        str,
        typer.Option(
            help="auto, always, never: for ONNX, apply factors one by one where that is as "
            "fast, wherever possible (least memory), or nowhere; ExecuTorch and Core ML apply them "
            "unless never."
        ),
    ] = "auto",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; chosen if not given.")] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            "--output-name",
            metavar="NAMES",
            help="Outputs to export, such as logits,pred_boxes; default all.",
        ),
    ] = None,
    trust_code: common.TrustCode = False,
    force: common.Force = False,
    json_: common.Json = False,
) -> None:
    """Export a compact model to a format that runs without tiedconv.

    ONNX, OpenVINO, torch's pt2, ExecuTorch and Core ML hold each stored tensor once. The size is
    checked, and outputs are compared with the model's, before the file is moved into place; if they
    can't be compared, the output says "Not checked" and why. The dense form is the plain state dict
    of the original class, at the original's size.
    """
    from tiedconv.commands.export import export as run

    done = run(
        file,
        output,
        to,
        dtype=dtype,
        lower=lower,
        opset=opset,
        trust_code=trust_code,
        force=force,
        outputs=[n.strip() for n in outputs.split(",")] if outputs else (),
    )
    if json_:
        common.print_json(done)
        return
    say(
        f"Wrote {done.path} ({render.size(done.size)}): {done.tensors} tensors, "
        f"{done.parameters:,} values."
    )
    for line in _facts(done):
        say(line)


def _facts(done: Exported) -> list[str]:
    lines = []
    if done.format != "dense":
        times = done.weight_bytes / done.stored_bytes
        lines.append(f"Its tensors take up {times:.3f} times the stored bytes.")
    if done.difference is None:
        lines.append(f"Not checked: the outputs. {done.not_checked}.")
    else:
        what = " and ".join(done.outputs) or "outputs"
        lines.append(f"Checked: on random images its {what} differ by {done.difference:.1e}.")
    if narrow := done.facts.get("narrow"):
        lines.append(f"{len(narrow)} weights are of layers as narrow as what is stored.")
    if padded := done.facts.get("padded"):
        why = done.facts.get("why_padded") or "its class has layers of this width"
        lines.append(
            f"{len(padded)} weights have the original's width, zeros for hidden units that were "
            f"removed: {why}."
        )
    if done.facts.get("integers_as_floats"):
        lines.append(
            "This format has no packed integers: they are floats in it. --dtype float16 or int8 "
            "stores fewer bytes."
        )
    if packed := done.facts.get("packed"):
        lines.append(
            f"{packed} matrices stay integers in it (INT4 where they fit, else INT8). ONNX Runtime "
            "multiplies them with activations rounded to 8 bits, unless the session's option "
            "session.qdq_matmulnbits_accuracy_level is 1, as in this check."
        )
    if done.facts.get("one_copy"):
        lines.append(
            "Some matrices are also read transposed. For one copy of them in memory, set ONNX "
            "Runtime's session.disable_prepacking to 1; it takes about a tenth more time."
        )
    return lines
