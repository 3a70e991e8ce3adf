"""Draws the results of accuracy.py; `scripts/results_docs.py` has them as tables.

    python benchmarks/pareto.py benchmarks/results/accuracy.json --out docs/pareto.png

One panel for each model that was made small to several sizes: top-1 after fine-tuning against the
bytes stored, with the spread over the seeds. Points of one method that a smaller one of its own
beats are drawn all the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

OURS = ("tied", "lors", "basis", "auto", "lowrank")
# Ours are solid and in strong colours; baselines are dashed and pale.
LOOKS: dict[str, tuple[str, str]] = {
    "auto": ("#d62728", "o"), "tied": ("#1f77b4", "s"), "lors": ("#2ca02c", "^"),
    "basis": ("#9467bd", "D"), "lowrank": ("#ff7f0e", "v"),
    "svd": ("#8c8c8c", "v"), "whitened-svd": ("#4d4d4d", "P"), "torch-pruning": ("#b07d62", "X"),
    "minivit": ("#5fa8b5", "<"), "half-width": ("#c9a227", ">"), "tied-scratch": ("#8fb3de", "s"),
    "half-width-whole": ("#8a6d0b", ">"), "tied-scratch-whole": ("#3f6fb0", "s"),
}  # fmt: skip
Runs = dict[tuple[str, str, float], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?",
                        default=Path(__file__).parent / "results" / "accuracy.json")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("docs/pareto.png"))
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="draw these alone")
    args = parser.parse_args()
    store = json.loads(args.result.read_text())
    runs: Runs = {}
    for key, run in store["runs"].items():
        model, method, budget, _ = key.split("/")
        runs.setdefault((model, method, float(budget)), []).append(run)
    models = [model for model in store["dense"] if len(_sizes(model, runs)) > 1]
    if args.only:
        runs = {k: v for k, v in runs.items() if k[1] in {*args.only, "dense-more"}}
    draw(models, runs, store["dense"], args.out)


def _sizes(model: str, runs: Runs) -> set[float]:
    """The budgets, in percent, to which a model was made smaller."""
    return {budget for name, _, budget in runs if name == model and budget < 100}


def _of(model: str, runs: Runs) -> list[tuple[tuple[str, str, float], list[dict[str, Any]]]]:
    """A model's runs: ours, baselines, dense; great budgets first."""
    order = {name: i for i, name in enumerate([*OURS, *LOOKS])}
    mine = [item for item in runs.items() if item[0][0] == model]
    place = {m: order.get(m, order.get(m.removesuffix("-datafree"), 99)) for _, m, _ in runs}
    return sorted(mine, key=lambda item: (place[item[0][1]], item[0][1], -item[0][2]))


def draw(models: list[str], runs: Runs, dense: Mapping[str, Any], out: Path) -> None:
    """The picture: a panel for each model, one legend below."""
    columns = min(2, len(models))
    rows = -(-len(models) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, 4.6 * rows), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, model in zip(axes.flat, models, strict=False):
        panel(axis, model, runs, dense[model], handles)
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    names = [n for n in LOOKS if n in handles]
    names += [n for n in handles if n not in names]
    figure.legend(
        [handles[n] for n in names], names, loc="outside lower center",
        ncols=4 if columns == 1 else 7, frameon=False, fontsize=9,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def panel(
    axis: Any, model: str, runs: Runs, dense: Mapping[str, Any], handles: dict[str, Any]
) -> None:
    """One model: a line for each method, dense across."""
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    for (_, method, _), found in _of(model, runs):
        done = [r for r in found if "infeasible" not in r]
        if done:
            scores = [100 * r["top1_finetuned"] for r in done]
            lines.setdefault(method, []).append((done[0]["bytes"] / 1e3, scores))
    for name, style, score in [
        ("dense", "-", 100 * dense["top1"]),
        *(("dense, trained on", ":", statistics.mean(s)) for _, s in lines.pop("dense-more", [])),
    ]:
        handles[name] = axis.axhline(score, color="black", linestyle=style, linewidth=1, zorder=1)
    for method, points in lines.items():
        base = method.removesuffix("-datafree")
        colour, marker = LOOKS.get(base, ("#e377c2", "o"))
        own = base in OURS
        points.sort()
        handles[method] = axis.errorbar(
            [x for x, _ in points],
            [statistics.mean(s) for _, s in points],
            [[statistics.mean(s) - min(s) for _, s in points],
             [max(s) - statistics.mean(s) for _, s in points]],
            color=colour, marker=marker, markersize=6 if own else 5, capsize=2,
            linewidth=2 if own else 1.2, zorder=3 if own else 2, elinewidth=1,
            linestyle=(":" if method != base else "-") if own else "--",
        )  # fmt: skip
    axis.set_xscale("log")
    sizes = [x for points in lines.values() for x, _ in points]
    if sizes:
        axis.set_xticks(_ticks(min(sizes), max(sizes)))
    axis.xaxis.set_major_formatter(FuncFormatter(_size))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("stored")
    axis.set_ylabel("top-1 on test after fine-tuning, %")
    axis.set_title(f"{model}, dense {_size(dense['bytes'] / 1e3)}", fontsize=11)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of kB, at most six, that span the sizes."""
    found = [d * 10**e for e in range(8) for d in (1, 2, 3, 5, 7)]
    inside = [x for x in found if 0.8 * low <= x <= 1.25 * high]
    return inside[:: max(1, -(-len(inside) // 6))]


def _size(kilobytes: float, _: object = None) -> str:
    return f"{kilobytes / 1e3:.3g} MB" if kilobytes >= 1000 else f"{kilobytes:.3g} kB"


if __name__ == "__main__":
    main()
