"""The part of `docs/results.md` that is about bytes: accuracy at equal sizes of real files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import table

BYTES = """## A budget of bytes

Bytes of real files against those of the original in float32. `auto --bytes` and the baselines get the same calibration
images, without labels, and nothing is trained on labels. Baselines: every linear layer and convolution rounded to
nearest, or by GPTQ, at 2, 3, 4, 5, 6 or 8 bits, with a scale a row or for 128, 64 or 32 columns, all else float16, written by
the benchmark itself; NNCF's weight compression of the OpenVINO form, 8 and 4 bits, to nearest, with scale estimation or
GPTQ (only its `.bin` is counted); torchao's weight-only integers of linear layers, counted as if their codes were packed. At
each size the setting of each with the least divergence on the calibration images is shown. *Same* is the share of images that
get the original's answer, *KL* the divergence of the outputs in nats; of features the cosine to the original's, and a vote
of the 20 nearest of 2,000 training photos on 1,000 others (CIFAR-10 at 98 px). All on images that nothing was fitted to. One
seed.

![What is kept against the bytes of the file](frontier.png)

{models}
"""

NAMES = {
    "vit-real": """**A ViT trained on CIFAR-10 by someone else** (546,186 parameters, top-1 {top} %), 512 training images to
calibrate by, judged on the 10,000 test images:""",
    "resnet-narrow": """**A bottleneck ResNet of a quarter of the width, trained here on CIFAR-10** for 900 steps (1,041,994
parameters, top-1 {top} %), 512 training images to calibrate by, judged on the 10,000 test images:""",
    "lite0": """**EfficientNet-Lite0, pretrained on ImageNet** (4,652,008 parameters, top-1 {top} % on 500 photos, which
are most likely of its training set), calibrated with 500 other photos:""",
    "dinov2": """**ViT-S/14, pretrained as DINOv2** (22,056,576 parameters; the vote of its features is right for {top} %), calibrated
with 256 ImageNet photos at 112 px, judged on 250 others:""",
}
COMMAND = (
    "    python benchmarks/frontier.py --model {model} --weights WEIGHTS.safetensors --data IMAGES"
)
METHODS = ("nearest", "gptq", "nncf", "torchao")


def frontier(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each model."""
    return BYTES.format(models="\n\n".join(filter(None, (_model(rows, m) for m in NAMES))))


def _model(rows: Sequence[dict[str, Any]], model: str) -> str:
    mine = [row for row in rows if row["model"] == model]
    asked = sorted({row["asked"] for row in mine if row["method"] == "auto"}, reverse=True)
    if not asked:
        return ""
    original = next(row for row in mine if row["method"] == "original")
    lines = []
    for size in asked:
        for method in METHODS:
            fits = [r for r in mine if r["method"] == method and r["percent"] <= size]
            if fits:
                best = min(fits, key=lambda r: float(r["calibration"]))
                lines.append((size, _setting(best), best))
        for effort in ("none", "fast", "normal"):
            for row in mine:
                if row.get("asked") == size and row.get("effort") == effort:
                    how = "without images" if effort == "none" else f"`--calib`, {effort}"
                    shared = " + ".join(row["schemes"]) or "nothing shared"
                    lines.append((size, f"`auto`, {how} ({shared})", row))
    features = "patches" in original
    cells = [
        [f"{size} %", name, f"{row['percent']:.2f} %", *(_features if features else _classes)(row)]
        for size, name, row in lines
    ]
    columns = ["at most", "method", "file"]
    columns += ["class token", "patches", "vote"] if features else ["top-1", "same", "KL"]
    top = original.get("vote", 0.0) if features else original["top1"]
    head = NAMES[model].format(top=f"{100 * top:.2f}")
    return f"{head}\n\n{COMMAND.format(model=model)}\n\n{table(columns, cells)}"


def _setting(row: Mapping[str, Any]) -> str:
    group = f"groups of {row['group']}" if row["group"] else "a row"
    how = "scale estimation" if row.get("scale_estimation") else "GPTQ" if row.get("gptq") else ""
    return ", ".join(filter(None, (row["method"], f"{row['bits']} bits", group, how)))


def _classes(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{100 * row['top1']:.2f} %", f"{100 * row['agreement']:.1f} %", f"{row['divergence']:.4f}",
    ]  # fmt: skip


def _features(row: Mapping[str, Any]) -> list[str]:
    vote = f"{100 * row['vote']:.1f} %" if "vote" in row else "-"
    return [f"{row['agreement']:.4f}", f"{row['patches']:.4f}", vote]
