"""Draws `docs/accuracy_time.png`: what is kept of a model against the time that it takes.

    python scripts/accuracy_time_picture.py [--model vit-real] [--batch 1] [--threads 1]

One panel for each runtime of `benchmarks/results/accuracy_time.json`: top-1 of each method (of a
model of features the cosine of the class token) against its time as a ratio to the original's (the
bar is the middle 80 % of the rounds), after calibration alone (lines) and after the training
(dashed).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parents[1]
ROWS = HERE / "benchmarks" / "results" / "accuracy_time.json"
PICTURE = HERE / "docs" / "accuracy_time.png"

RUNTIMES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "PyTorch, eager",
    "compiled": "PyTorch, compiled",
}
METHODS = {
    "auto": ("tiedconv --macs", "#c1121f", "o"),
    "lowrank": ("low rank alone", "#ef8354", "v"),
    "narrow": ("narrow alone", "#7a5195", "D"),
    "torch-pruning": ("torch-pruning", "#669bbc", "s"),
}
TITLES = {
    "vit-real": "ViT, CIFAR-10",
    "resnet-narrow": "bottleneck ResNet, CIFAR-10",
    "lite0": "EfficientNet-Lite0, ImageNet",
    "dinov2": "ViT-S/14, photos of ImageNet",
}


def curve(
    rows: list[dict[str, Any]], method: str, trained: bool, timed: dict[int, dict[str, Any]]
) -> list[tuple[float, float, float, float]]:
    """Time, its bounds, and what is kept of a method's sizes, by time."""
    mine = [r for r in rows if r["method"] == method and "agreement" in r and "steps" in r]
    chosen = [r for r in mine if bool(r["steps"]) == trained and r["asked"] in timed]
    found = [(timed[r["asked"]], kept(r)) for r in chosen]
    return sorted((t["ratio"], t["low"], t["high"], share) for t, share in found)


def kept(row: dict[str, Any]) -> float:
    """Percent: top-1; of a model of features the cosine of the class token."""
    return 100 * float(row.get("top1", row["agreement"]))


def main() -> None:
    """Draw and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=TITLES, default="vit-real")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    rows = [r for r in json.loads(args.rows.read_text("utf-8"))["rows"] if r["model"] == args.model]
    times = [r for r in rows if (r.get("batch"), r.get("threads")) == (args.batch, args.threads)]
    shown = [name for name in RUNTIMES if any(r["on"] == name for r in times)]
    whole = next(kept(r) for r in rows if r["method"] == "original")
    is_features = not any("top1" in r for r in rows)
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.6 * len(shown), 3.8), dpi=110, sharey=True, squeeze=False
    )
    for axis, runtime in zip(axes[0], shown, strict=True):
        axis.axhline(whole, color="black", linewidth=0.8, linestyle=":")
        axis.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
        for method, (label, colour, mark) in METHODS.items():
            own = [r for r in times if (r["method"], r["on"]) == (method, runtime)]
            timed = {r["asked"]: r for r in own}
            for trained in (False, True):
                points = curve(rows, method, trained, timed)
                if not points:
                    continue
                x, low, high, y = (list(column) for column in zip(*points, strict=True))
                spread = [
                    [at - least for at, least in zip(x, low, strict=True)],
                    [most - at for at, most in zip(x, high, strict=True)],
                ]
                axis.errorbar(
                    x, y, xerr=None if trained else spread, color=colour, marker=mark,
                    markersize=4, linewidth=1.2, linestyle="--" if trained else "-",
                    elinewidth=0.6, label=None if trained else label,
                )  # fmt: skip
        axis.set(title=RUNTIMES[runtime], xlabel="time (ratio to the original's)")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("cosine of the class token (%)" if is_features else "top-1 (%)")
    axes[0][0].legend(loc="lower right", frameon=False, fontsize=8)
    threads = "one thread" if args.threads == 1 else f"{args.threads} threads"
    figure.suptitle(
        f"{TITLES[args.model]}: batch {args.batch}, {threads} "
        "(lines: after calibration; dashed: after training)",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
