"""The part of `docs/results.md` that is about narrower layers."""

from __future__ import annotations

from typing import Any

from markdown_table import table

TEXT = """## Narrow

Hidden units removed (`narrow`; of a ViT heads too) beside low rank, `auto` and torch-pruning, after calibration with 512
training images of CIFAR-10, or 256 photos of ImageNet, alone: no training. *fast* is the closed-form fit with the statistics
of batch norms, *normal* the block-wise fit besides; empty cells were not measured. *Same* is the fraction of images with the
original's prediction, after *fast*. torch-pruning has the multiply-adds of the line beside it and labels of the same
images for its gradients, but no fit of any kind: what remains keeps its weights, and batch norms their statistics. The better
of two forms counts. Multiply-adds are those that PyTorch's counter counts as the models run, without the products inside of
attention. Lite0 is EfficientNet-Lite0 at 224 px on 500 other photos, most likely of its training set.

    python benchmarks/narrow.py --model vit-real --weights VIT.safetensors --data CIFAR10
    python benchmarks/narrow.py --model resnet-narrow --weights RESNET.safetensors --data CIFAR10
    python benchmarks/narrow.py --model lite0 --weights LITE0.safetensors --data PHOTOS

{accuracy}

At equal multiply-adds `narrow` is ahead of torch-pruning wherever both were measured{lead}. On Lite0 it is far ahead of low
rank, whose factors of narrow 1x1 convolutions save little, and `auto` makes the same model. Low rank is ahead of `narrow` on
this ViT, whose hidden layers are only twice as wide as its tokens and which has four heads.
{timed}"""

TIMES = """
What narrow layers take in time: random weights, {images} images, one thread, all forms by turns, the least of many runs.
`lowrank` has as many parameters as `narrow`, its factors applied one by one.

    python benchmarks/narrow.py --times

{times}
"""


def section(rows: list[dict[str, Any]]) -> str:
    """The tables of `benchmarks/results/narrow.json`."""
    lines, leads = [], []
    fast = [r for r in rows if r.get("effort") in ("fast", "") and "top1" in r]
    for row in fast:
        if row["method"].startswith("torch-pruning"):
            continue
        same = {"model": row["model"], "asked": row["asked"]}
        pruned = _find(rows, **same, method=f"torch-pruning as {row['method']}")
        normal = _find(rows, **same, method=row["method"], effort="normal")
        if pruned is not None and row["method"].startswith("narrow"):
            leads.append(100 * (row["top1"] - pruned["top1"]))
        lines.append([
            row["model"], row["method"], f"{100 * row['parameters']:.1f} %",
            f"{100 * row['multiply_adds']:.1f} %", _percent(row), f"{100 * row['agreement']:.1f} %",
            _percent(normal), _percent(pruned),
        ])  # fmt: skip
    head = [
        "model",
        "method",
        "parameters",
        "multiply-adds",
        "top-1, fast",
        "same",
        "normal",
        "torch-pruning",
    ]
    timed = [row for row in rows if "eager_ms" in row]
    lines_of_times = [
        [row["model"], row["method"], f"{100 * row['multiply_adds']:.1f} %",
         f"{row['eager_ms']:.0f} ms", f"{row['onnx_ms']:.0f} ms"]
        for row in timed
    ]  # fmt: skip
    times = table(["model", "form", "multiply-adds", "eager", "ONNX Runtime"], lines_of_times)
    return TEXT.format(
        accuracy=table(head, lines),
        lead=f", by {min(leads):.1f} to {max(leads):.1f} points" if leads else "",
        timed=TIMES.format(images=timed[0]["images"], times=times) if timed else "",
    )


def _find(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next((row for row in rows if wanted.items() <= row.items()), None)


def _percent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{100 * row['top1']:.2f} %"
