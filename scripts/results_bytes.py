"""The part of `docs/results.md` that is about bytes: accuracy at equal sizes of real files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markdown_table import table

BYTES = """## A budget of bytes

Bytes of real files against those of the original in float32. `auto --bytes` and the baselines get the same calibration
images, without labels, and nothing is trained on labels. Baselines: every linear layer and convolution rounded to
nearest, or by GPTQ, at 2, 3, 4, 5, 6 or 8 bits, with a scale a row or for 128, 64 or 32 columns, all else float16; at each
size the one with the least divergence on the calibration images is shown. They are written by the benchmark itself, not by a
package. *Same* is the share of images that get the original's answer, *KL* the divergence of the outputs in nats,
both on images that nothing was fitted to. One seed.

{models}
"""

NAMES = {
    "vit-real": """**A ViT trained on CIFAR-10 by someone else** (546,186 parameters, top-1 {top1} %), 512 training images to
calibrate by, judged on the 10,000 test images:""",
    "lite0": """**EfficientNet-Lite0, pretrained on ImageNet** (4,652,008 parameters, top-1 {top1} % on 500 photos, which
are most likely of its training set), calibrated with 500 other photos:""",
}
COMMAND = (
    "    python benchmarks/frontier.py --model {model} --weights WEIGHTS.safetensors --data IMAGES"
)


def frontier(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each model."""
    return BYTES.format(models="\n\n".join(_model(rows, model) for model in NAMES))


def _model(rows: Sequence[dict[str, Any]], model: str) -> str:
    mine = [row for row in rows if row["model"] == model]
    if not mine:
        return ""
    original = next(row for row in mine if row["method"] == "original")
    asked = sorted({row["asked"] for row in mine if row["method"] == "auto"}, reverse=True)
    lines = []
    for size in asked:
        for method in ("nearest", "gptq"):
            fits = [r for r in mine if r["method"] == method and r["percent"] <= size]
            if fits:
                best = min(fits, key=lambda r: float(r["calibration"]))
                group = f"groups of {best['group']}" if best["group"] else "a row"
                lines.append((size, f"{method}, {best['bits']} bits, {group}", best))
        for effort in ("none", "fast", "normal"):
            for row in mine:
                if row.get("asked") == size and row.get("effort") == effort:
                    how = "without images" if effort == "none" else f"`--calib`, {effort}"
                    shared = " + ".join(row["schemes"]) or "nothing shared"
                    lines.append((size, f"`auto`, {how} ({shared})", row))
    cells = [
        [
            f"{size} %", name, f"{row['percent']:.2f} %", f"{100 * row['top1']:.2f} %",
            f"{100 * row['agreement']:.1f} %", f"{row['divergence']:.4f}",
        ]
        for size, name, row in lines
    ]  # fmt: skip
    columns = ["at most", "method", "file", "top-1", "same", "KL"]
    head = NAMES[model].format(top1=f"{100 * original['top1']:.2f}")
    return f"{head}\n\n{COMMAND.format(model=model)}\n\n{table(columns, cells)}"
