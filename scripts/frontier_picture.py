"""Draws `docs/frontier.png`: what is kept of a model against the bytes of its file.

    python scripts/frontier_picture.py

One panel for each model of `benchmarks/results/frontier.json`; of each method the settings that
no smaller file of it beats on the calibration images, of `tiedconv` the effort `normal`, which is the
default, or `fast` for models that were not measured with that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

HERE = Path(__file__).parents[1]
ROWS = HERE / "benchmarks" / "results" / "frontier.json"
PICTURE = HERE / "docs" / "frontier.png"

PANELS = {
    "vit-real": ("ViT, CIFAR-10", "top1", "top-1 (%)"),
    "resnet-narrow": ("bottleneck ResNet, CIFAR-10", "top1", "top-1 (%)"),
    "lite0": ("EfficientNet-Lite0, ImageNet", "agreement", "same answer as the original (%)"),
    "dinov2": ("ViT-S/14 (DINOv2), features", "agreement", "cosine of the class token (%)"),
}
METHODS = {
    "auto": ("tiedconv --bytes", "#c1121f", "o"),
    "gptq": ("GPTQ", "#669bbc", "s"),
    "nncf": ("NNCF", "#7a5195", "D"),
    "torchao": ("torchao", "#ef8354", "v"),
    "nearest": ("rounding to nearest", "#9a9a9a", "^"),
}


def best(rows: list[dict[str, Any]], method: str, key: str) -> list[tuple[float, float]]:
    """Sizes and figures of a method's settings that no smaller file of it beats."""
    mine = sorted((r for r in rows if r["method"] == method), key=lambda r: r["percent"])
    found: list[tuple[float, float]] = []
    least = float("inf")  # by the calibration images, where there are several settings
    for row in mine:
        cost = row.get("calibration", row["divergence"])
        if cost < least:
            least = cost
            found.append((row["percent"], 100 * row[key]))
    return found


def main() -> None:
    """Draw and write it."""
    rows = json.loads(ROWS.read_text("utf-8"))
    default = {r["model"] for r in rows if r.get("effort") == "normal"}
    rows = [
        r for r in rows
        if r["method"] != "auto"
        or r["effort"] == ("normal" if r["model"] in default else "fast")
    ]  # fmt: skip
    ready = {r["model"] for r in rows if r["method"] == "auto"}
    shown = [model for model in PANELS if model in ready]
    count = -(-len(shown) // 2)
    figure, grid = plt.subplots(count, 2, figsize=(9.6, 3.7 * count), dpi=110, squeeze=False)
    axes = [axis for row in grid for axis in row]
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, model in zip(axes, shown, strict=False):
        title, key, label = PANELS[model]
        mine = [r for r in rows if r["model"] == model]
        whole = next(r for r in mine if r["method"] == "original")
        top = 100 * (whole[key] if key == "top1" else 1.0)
        axis.axhline(top, color="black", linewidth=0.8, linestyle=":")
        curves = {name: best(mine, name, key) for name in METHODS}
        lowest = min(y for x, y in curves["auto"] if x <= 30)
        lowest = lowest if key == "top1" else min(lowest, top - 10)
        span = max(top - lowest, 0.5)
        for name, (text, colour, mark) in METHODS.items():
            if curves[name]:
                axis.plot(*zip(*curves[name], strict=True), color=colour, marker=mark,
                          markersize=5, linewidth=2 if name == "auto" else 1.2, label=text,
                          zorder=3 if name == "auto" else 2)  # fmt: skip
        axis.set(
            title=title,
            xlabel="bytes of the file (% of float32)",
            ylabel=label,
            xscale="log",
            ylim=(lowest - 0.15 * span, top + 0.08 * span),
            xlim=(2.5, 32),
        )
        axis.set_xticks([3, 4, 6, 8, 10, 14, 20, 30], minor=False)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="lower right", frameon=False, fontsize=9)
    figure.suptitle(
        "Below a seventh of the bytes tiedconv keeps more than quantisers do (dotted: the original)",
        fontsize=12,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(PICTURE)


if __name__ == "__main__":
    main()
