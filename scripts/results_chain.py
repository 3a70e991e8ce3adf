"""The part of `docs/results.md` that is about models of many kinds of output."""

from __future__ import annotations

from typing import Any

from markdown_table import table

TEXT = """## The whole chain on many kinds of output

Converted to a number of bytes with 128 photos without labels (`auto`), verified against the original, distilled on 128
photos (40 steps of 16, `--distill 1`), exported to ONNX and compared. Models named *tiny* are of transformers' classes
with random weights, as is the network of YOLO's shape: their figures show that each step does what it says, and nothing of
accuracy. *Same* is what the report compares, on held-out photos: after the conversion, before and after the distillation.
*Distance* is that of the outputs to the original's before and after the block-wise fit, in nats for each image.

    python benchmarks/chain.py --photos PHOTOS --dinov2 FOLDER --lite0 LITE0.safetensors

{table}

ViT-MAE is not exported, as it masks its patches at random. *Verified* names what could not be compared.
"""


def section(rows: dict[str, dict[str, Any]]) -> str:
    """The table of `benchmarks/results/chain.json`."""
    lines = [_line(name, row) for name, row in rows.items()]
    head = [
        "model",
        "bytes",
        "compared",
        "same",
        "distance",
        "distilled",
        "verified",
        "ONNX, off by",
    ]
    return TEXT.format(table=table(head, lines))


def _line(name: str, row: dict[str, Any]) -> list[str]:
    before, after = row["distance"]
    verified = row["verify"] if isinstance(row["verify"], str) else "all" if row["verify"] else "no"
    distilled = row["distil"]
    return [
        name, row["bytes"], row["compared"], f"{row['converted']:.4f}",
        f"{before:.2g} to {after:.2g}" if row["effort"] != "fast" else f"{after:.2g}",
        distilled if isinstance(distilled, str) else " to ".join(f"{x:.4f}" for x in distilled),
        verified.split(":")[0], row["onnx"] if isinstance(row["onnx"], str) else f"{row['onnx']:.0e}",
    ]  # fmt: skip
