"""The parts of `docs/results.md` that are about multiply-adds and time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from markdown_table import ranged, table
from results_folder import ROOT, comment_on

Rows = list[dict[str, Any]]

TRAINED = """## Multiply-adds, beside torch-pruning

Top-1 (of ImageNet photos: the share of the original's predictions) at equal multiply-adds, as `torch.utils.flop_counter`
counts them while a model runs: `auto --macs`, calibrated without labels (`fast`), and torch-pruning, which ranks by gradients
on as many images, for which it has their labels, in one step and the better of two forms. Then both get {steps} steps of
distillation, torch-pruning at the best of three learning rates; mean and range of {seeds} seeds. Without the sparse training and
the rounds of pruning that its authors' best results take.

    python benchmarks/macs_trained.py --weights VIT.safetensors --data CIFAR10
    python benchmarks/macs_trained.py --model resnet-narrow --weights RESNET.safetensors --data CIFAR10
    python benchmarks/macs_trained.py --model lite0 --weights LITE0.safetensors --data PHOTOS

{table}

{comment}
"""

BUDGETS = """## Budgets of multiply-adds

A ViT that someone else trained on CIFAR-10, calibrated on {images} images without labels, nothing trained; all test images. *Same*
is the fraction of images with the original's prediction.

    python benchmarks/macs.py --weights VIT.safetensors --data CIFAR10 --efforts fast normal

{table}

{comment}
"""

LATENCY = """## Budgets of time

How well `--latency` keeps its word: models with random weights, which take as long as others, converted by scheme `lowrank` on
{processor}. *Predicted* is what the conversion said, *measured* the file against the dense model, in turn in every round, each
in a process of its own (median, and the middle 80 % of {rounds} rounds); *compiled* is `torch.compile` after `optimize`, of
which eager PyTorch's time is the prediction. {close} of {count} predictions are within 15 % of what was measured{worst}.
{rehearsed}
{refused}

    python benchmarks/latency.py

{table}

{comment}
"""

REHEARSED = """Of predictions with * a whole model of the plan was timed before the fit, as `convert` does now; the others are older, by
the times of layers and of one model of thin layers. Refusals are of either."""

AGAINST_TIME = """## Accuracy against time

What is kept of a model against the time that it takes, after calibration alone and after {steps} steps of training: `auto
--macs`, the schemes `lowrank` and `narrow` alone, and torch-pruning at the multiply-adds that `auto` has. Time is a ratio to the
original's, both in turn, on {processor}: its median over the rounds. *Kept* is top-1, of ViT-S/14 the cosine of the class token.

    python benchmarks/accuracy_time.py --weights VIT.safetensors --data CIFAR10
    python benchmarks/accuracy_time.py --model dinov2 --weights FOLDER --data PHOTOS --steps 0
    python scripts/accuracy_time_picture.py

{picture}{tables}

{comment}
"""

MODELS = {
    "vit-real": "ViT, CIFAR-10",
    "resnet-narrow": "narrow ResNet, CIFAR-10",
    "lite0": "EfficientNet-Lite0",
    "dinov2": "ViT-S/14",
}
RUNTIMES = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "eager",
    "compiled": "compiled",
}


def trained(rows: Rows) -> str:
    """The table of `benchmarks/results/macs_trained.json`."""
    lines, steps = [], max(row["steps"] for row in rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        what = "agreement" if model == "lite0" else "top1"
        own = [row for row in rows if row["model"] == model]
        for asked in sorted({row["asked"] for row in own}, reverse=True):
            line: list[str] = []
            for after, method in ((a, m) for a in (0, steps) for m in ("auto", "torch-pruning")):
                found = [
                    100 * r[what] for r in own
                    if (r["asked"], r["method"], r["steps"]) == (asked, method, after)
                ]  # fmt: skip
                line.append(ranged(found) if found else "-")
            share = next(row["macs"] for row in own if row["asked"] == asked)
            lines.append([MODELS[model], f"{100 * share:.0f} %", *line])
    head = ["model", "multiply-adds", "`auto`", "torch-pruning"]
    return TRAINED.format(
        steps=steps, seeds=len({row["seed"] for row in rows if "seed" in row}),
        table=table([*head, *(f"{name}, trained" for name in head[2:])], lines),
        comment=comment_on("macs_trained"),
    )  # fmt: skip


def budgets(rows: Rows) -> str:
    """The table of `benchmarks/results/macs.json`."""
    lines = [
        [
            " ".join(f"`--{name} {value}`" for name, value in row.get("asked", {}).items())
            or "the original",
            row.get("effort", "-"), f"{100 * row.get('macs', 1):.1f} %",
            f"{100 * row.get('params', 1):.1f} %", f"{100 * row['top1']:.2f}",
            f"{100 * row['agreement']:.1f} %",
        ]
        for row in rows
    ]  # fmt: skip
    head = ["asked", "effort", "multiply-adds", "parameters", "top-1", "same"]
    return BUDGETS.format(images=256, table=table(head, lines, words=2), comment=comment_on("macs"))


def latency(data: dict[str, Any]) -> str:
    """The table of `benchmarks/results/latency.json`."""
    rows = [row for row in data["rows"] if "measured" in row]
    lines = [
        [
            r["model"], RUNTIMES[r["on"]], f"{r['on_batch_size']}, {r['on_threads']}", r["asked"],
            f"{r['predicted']:.2f}{' *' if r.get('rehearsed') else ''}",
            f"{r['measured']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            f"{100 * r['macs']:.0f} %",
        ]
        for r in rows
    ]  # fmt: skip
    refused: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in data["rows"]:
        if "measured" not in row:
            place = f"{RUNTIMES[row['on']]} {row['on_batch_size']}, {row['on_threads']}"
            refused[row["model"], place].append(row["asked"])
    listed = "; ".join(
        f"{model} in {place}: {', '.join(asked)}" for (model, place), asked in refused.items()
    )
    eager = [r for r in rows if r["on"] != "compiled"]
    off = {id(r): r["predicted"] / r["measured"] - 1 for r in eager}
    far = [r for r in eager if abs(off[id(r)]) > 0.15]
    worst = "".join(
        f"; {r['model']} in {RUNTIMES[r['on']]} {r['on_batch_size']}, {r['on_threads']} at "
        f"{r['asked']} is off by {100 * abs(off[id(r)]):.0f} %"
        for r in far
    )
    return LATENCY.format(
        processor=data["processor"], rounds=data["rounds"], close=len(eager) - len(far),
        count=len(eager), worst=worst,
        rehearsed="" if all("rehearsed" in r for r in rows) else REHEARSED,
        refused=f"Refused, as no ranks are that fast (batch, threads): {listed}." if listed else "",
        table=table(
            ["model", "runtime", "batch, threads", "asked", "predicted", "measured",
             "multiply-adds"],
            lines, words=2,
        ),
        comment=comment_on("latency"),
    )  # fmt: skip


def against_time(data: dict[str, Any]) -> str:
    """The tables of `benchmarks/results/accuracy_time.json`."""
    rows: Rows = data["rows"]
    picture = ROOT / "docs" / "accuracy_time.png"
    shown = "![Accuracy against time](accuracy_time.png)\n\n" if picture.is_file() else ""
    return AGAINST_TIME.format(
        steps=max(row.get("steps", 0) for row in rows), processor=data["processor"],
        picture=shown, tables="\n\n".join(map(_times, _models(rows))),
        comment=comment_on("accuracy_time"),
    )  # fmt: skip


def _models(rows: Rows) -> list[Rows]:
    names = dict.fromkeys(row["model"] for row in rows)
    return [[row for row in rows if row["model"] == name] for name in names]


def _times(rows: Rows) -> str:
    """The table of one model."""
    timed = [row for row in rows if "ratio" in row]
    places = list(dict.fromkeys((r["on"], r["batch"], r["threads"]) for r in timed))
    steps = max(row.get("steps", 0) for row in rows)
    lines = []
    for asked, method in dict.fromkeys((r["asked"], r["method"]) for r in timed):
        mine = [row for row in rows if (row.get("asked"), row["method"]) == (asked, method)]
        by = {(r["on"], r["batch"], r["threads"]): r["ratio"] for r in mine if "ratio" in r}
        kept = {r["steps"]: _kept(r) for r in mine if "agreement" in r}
        macs = next(r["macs"] for r in mine if "macs" in r)
        lines.append([
            method, f"{100 * macs:.0f} %", kept.get(0, "-"), *([kept.get(steps, "-")] * bool(steps)),
            *(f"{by[place]:.2f}" if place in by else "-" for place in places),
        ])  # fmt: skip
    head = ["method", "multiply-adds", "kept", *(["trained"] * bool(steps))]
    whole = next(_kept(row) for row in rows if row["method"] == "original")
    title = f"{MODELS[rows[0]['model']]} (the original: {whole}; batch, threads):\n\n"
    return title + table([*head, *(f"{RUNTIMES[on]} {b}, {t}" for on, b, t in places)], lines)


def _kept(row: dict[str, Any]) -> str:
    return f"{100 * row.get('top1', row['agreement']):.2f}"
