"""Write `docs/results.md` from `benchmarks/results/*.json`, so that no figure is typed by hand.

python scripts/results_docs.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

import results_bytes
import results_chain
import results_detectors
import results_fits
import results_narrow
import results_speed
import results_training
from markdown_table import table
from results_folder import RESULTS, ROOT, comment_on

HEAD = """# Results

Made by `scripts/results_docs.py` from `benchmarks/results/*.json`. Each table names the command
that measures it.
"""

ACCURACY = """## Accuracy at equal size: tiedconv and baselines

CIFAR-10 as JPEG files: 45,000 training images, 5,000 held out of them for every choice, 10,000 test
images. `vit-real` is a ViT that someone else trained on all 50,000 (so its held-out images were seen
in its training); `resnet-narrow` is self-trained on the 45,000
(`benchmarks/train_models.py --model resnet-narrow --steps 2500`: 14 epochs of shifts and flips).{about} Each method
makes a model of at most the budget, in parameters of the whole model (`minivit`, which has no size parameter, of the nearest
size), and each gets the same
training: {steps} steps of {batch} images ({images:,} images, reflected shifts and flips), AdamW, the original as teacher
(temperature {temperature:g}, weight {distill:g}). The learning rate, one of {rates}, and a baseline's variant are chosen after
{select_steps} steps on {select_images:,} held-out images, at each budget; where the highest was the best,
0.01 is tried too{untried}. *Converted* is without data, *calibrated* with {calib_images:,} training images without labels, *fine-tuned*
at the end. *Stored* is parameters, *file* bytes with all that a compact file says of itself (about 20 kB), *FLOPs* those of the dense
model. Seeds: {seeds}; they decide the order and augmentation of the training images (and random weights, where there are
any), one calibration serves all. What each baseline does, and where it falls short of its paper, is in
`benchmarks/baselines.py`.

    pip install -r benchmarks/accuracy_requirements.txt
    python benchmarks/accuracy.py --data CIFAR10 --vit VIT.safetensors --models MODELS --model vit-real \\
        --steps {steps} --select-steps {select_steps} --select-images {select_images}

{tables}

![Accuracy against stored bytes](pareto.png)

{comment}
"""

ABOUT = {
    "vit-d128": """ `vit-d128` is self-trained too (`--model vit-d128 --steps 2000 --drop-patches 0.5`:
11 epochs, half of the patches left out in three quarters of them).""",
    "resnet-narrow-2": """ `resnet-narrow-2` is
the ResNet's training done once more, with another number of threads (`--name resnet-narrow-2`).""",
    "resnet-narrow-tiny": """ `resnet-narrow-tiny` is the
same network, trained by the same command on Tiny-ImageNet at 32 pixels, 200 classes: 90,000 training images (7 epochs,
which is brief), 10,000 held out, and as
test images the 10,000 that the data set has for validation (`--data TINY --model resnet-narrow --name resnet-narrow-tiny`).""",
    "resnet-narrow-tiny-long": """
`resnet-narrow-tiny-long` is that model with a longer fine-tuning for all methods, {long} steps: a tenth of the images of its training.""",
}
"""What is said of each model that has results."""

SPEED = """## Speed

CPU time of the tied model over that of the dense one, taken by turns in one process; median of
{rounds} pairs, quartiles in brackets. torch {torch}, {threads} threads, random weights and images of 224 px.

    python benchmarks/speed.py

{table}
"""

CONVERSION = """## Time and memory of conversion

ViT-B/16 ({dense:.0f} MB dense). Seconds are wall-clock without imports, each run a process of its own;
the ratio is to building the model, loading its checkpoint and saving it again, taken by turns
({rounds} rounds, range in brackets). Memory is the peak of the process, Python and torch included,
over the size of the dense checkpoint.

    python benchmarks/conversion.py

{table}

{plan}
"""

PLAN = """`tiedconv plan vit_b_16`, which shows what each scheme stores at three budgets, takes {seconds:.1f} s ({low:.1f} to {high:.1f}, {rounds}
times) from its start to its end, imports and all."""


EXPORT = """## Exported files in ONNX Runtime

Random weights; ONNX Runtime {ort}, one thread, each form in a process of its own, in turns, {rounds} turns.
*File* is the ONNX file over the bytes of the stored tensors. *Held* is the memory that the loaded model
takes, *load* the time until it is ready and *batch* the time of a run, each as a share of the dense
model's ONNX; in brackets the middle 80 % of turns. *Off* is the largest difference of a logit from PyTorch's,
as a share of the largest. *One copy* is with `session.disable_prepacking`.

    python benchmarks/export.py

{table}
"""


def export(data: dict[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    batches: list[str] = []
    for model, schemes in data["models"].items():
        for scheme, found in schemes.items():
            share = f"{100 * found['stored'] / found['parameters']:.1f} %"
            for way, run in found["runs"].items():
                if way == "dense":
                    continue
                file = found["files"][way.split(",")[0]]
                batches = list(run["latency"])
                times = [
                    f"{t['ratio']:.2f} ({t['low']:.2f} to {t['high']:.2f})"
                    for t in run["latency"].values()
                ]
                rows.append(
                    (
                        model, f"`{scheme}`, {share}", way, f"{file['to_stored']:.3f}",
                        f"{run['held_ratio']:.2f}", f"{run['load_ratio']:.2f}", *times,
                        f"{file['off']:.0e}",
                    )
                )  # fmt: skip
    columns = ("model", "scheme", "lower", "file", "held", "load",
               *(f"batch {b}" for b in batches), "off")  # fmt: skip
    return EXPORT.format(
        ort=data["versions"]["onnxruntime"], rounds=data["rounds"], table=table(columns, rows, 3)
    )


FUZZ = """## Files that were tampered with

{count:,} mutations of {files} valid files: bits flipped, bytes cut and moved, tensors swapped, and plans,
histories, sources and headers forged with right hashes. Each is given to `load`, `report` and `verify`.

    python benchmarks/fuzz.py --count {count}

{table}

Slowest: {seconds:.2f} s. Most memory beyond a valid file's: {megabytes:.0f} MB. Loaded with other weights under the
same digest, or ended otherwise than by one of tiedconv's own errors: {wrong}.
"""

STREAMING = """## Conversion of a model larger than the memory

A random checkpoint of {size:.2f} GB ({depth} layers of width {width}), converted by the command line, one thread. Peak memory
of the process, Python and torch included ({imports:.0f} MB before any work).

    python benchmarks/streaming.py

{table}

`lors` shares one base among all {depth} layers, and keeps the factors of one role in all of them at once: hence its
higher peak.
"""


def fuzz(data: dict[str, Any]) -> str:
    return FUZZ.format(
        count=data["mutations"], files=len(data["of"]), wrong=len(data["wrong"]),
        seconds=data["slowest"]["seconds"], megabytes=data["memory"]["megabytes"],
        table=table(("outcome", "files"), [(k, f"{v:,}") for k, v in data["outcomes"].items()]),
    )  # fmt: skip


def streaming(data: dict[str, Any]) -> str:
    rows = [
        (
            f"`{r['case']}`", f"{100 * r['ratio']:.1f} %", f"{r['peak_rss'] / 1e6:,.0f} MB",
            f"{r['rss_anon'] / 1e6:,.0f} MB", f"{r['seconds']:,.0f}",
        )
        for r in data["rows"]
    ]  # fmt: skip
    return STREAMING.format(
        size=data["dense_bytes"] / 1e9, depth=data["depth"], width=data["width"],
        imports=data["imports"]["tiedconv.cli"]["peak_rss"] / 1e6,
        table=table(("scheme", "stored", "peak", "of it anonymous", "seconds"), rows),
    )  # fmt: skip


def main() -> None:
    parts = [HEAD]
    for name, section in (
        ("accuracy", accuracy),
        ("frontier", results_bytes.frontier),
        ("frontier_trained", results_bytes.trained),
        ("frontier_ablation", results_bytes.ablation),
        ("packed", results_bytes.packed),
        ("narrow", results_narrow.section),
        ("macs", results_speed.budgets),
        ("macs_trained", results_speed.trained),
        ("accuracy_time", results_speed.against_time),
        ("latency", results_speed.latency),
        ("chain", results_chain.section),
        ("detection", results_detectors.detection),
        ("adamixer_overfit", results_detectors.overfit),
        ("adamixer_speed", results_detectors.times),
        ("ablation", results_fits.ablation),
        ("calibration_cost", results_fits.cost),
        ("calib_images", results_fits.images),
        ("few_photos", results_fits.few),
        ("datafree", results_fits.datafree),
        ("speed", speed),
        ("finetune_start", results_training.start),
        ("training_speed", results_training.speed),
        ("recipe", results_training.recipe),
        ("recipe_resnet", results_training.recipe),
        ("recipe_epoch", results_training.epoch),
        ("recipe_resnet_epoch", results_training.epoch),
        ("recipe_datafree", results_training.progressive),
        ("borders", results_training.borders),
        ("export", export),
        ("conversion", conversion),
        ("streaming", streaming),
        ("fuzz", fuzz),
    ):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text())))
    notes = RESULTS / "notes.md"
    if notes.is_file():
        parts.append(notes.read_text("utf-8"))
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), "utf-8")


def accuracy(data: dict[str, Any]) -> str:
    setting = next(iter(data["settings"].values()))
    runs = {tuple(key.split("/")): run for key, run in data["runs"].items()}
    seeds = sorted({key[3] for key in runs})
    return ACCURACY.format(
        **{k: setting[k] for k in ("steps", "batch", "temperature", "distill", "select_steps",
                                   "select_images", "calib_images")},
        images=setting["steps"] * setting["batch"],
        rates=", ".join(f"{r:g}" for r in setting["rates"]),
        seeds=", ".join(seeds),
        untried=untried(data["select"], setting["rates"][-1]),
        about="".join(
            text.format(long=data["settings"][model]["steps"])
            for model, text in ABOUT.items()
            if model in data["dense"]
        ),
        tables="\n\n".join(accuracy_table(m, d, runs) for m, d in data["dense"].items()),
        comment=comment_on("accuracy"),
    )  # fmt: skip


def untried(select: dict[str, Any], highest: float) -> str:
    """For which rows no rate above the grid was tried, though its highest was the best."""
    names = [key for key, found in select.items() if _stops_at(found["held_out"], highest)]
    listed = ", ".join(f"`{name}`" for name in names)
    return f" (not for {listed}: they are older than that rule)" if names else ""


def _stops_at(scores: dict[str, float], highest: float) -> bool:
    variants: dict[str, dict[float, float]] = {}
    for key, score in scores.items():
        variant, _, rate = key.partition("@")
        variants.setdefault(variant, {})[float(rate)] = score
    return any(
        max(rates, key=rates.__getitem__) == highest == max(rates) for rates in variants.values()
    )


def accuracy_table(model: str, dense: dict[str, Any], runs: dict[tuple[str, ...], Any]) -> str:
    """One model: a row for each method and budget, the best of each budget in bold."""
    mine: dict[tuple[str, str], list[Any]] = {}
    for (name, method, budget, _), run in runs.items():
        if name == model:
            mine.setdefault((method, budget), []).append(run)
    best = {
        budget: max(
            (
                mean_of(found, "top1_finetuned") or 0.0
                for (_, b), found in mine.items()
                if b == budget
            )
        )
        for _, budget in mine
    }
    rows: list[Sequence[str]] = []
    for (method, budget), found in sorted(mine.items(), key=lambda i: (-float(i[0][1]), i[0][0])):
        done = [run for run in found if "infeasible" not in run]
        if not done:
            rows.append((f"{budget} %", f"`{method}`", "not reached", "", "", "", "", ""))
            continue
        final = spread(done, "top1_finetuned")
        if mean_of(done, "top1_finetuned") == best[budget] and budget != "100":
            final = f"**{final}**"
        rows.append(
            (
                f"{budget} %", f"`{method}`",
                f"{100 * done[0]['parameters'] / dense['parameters']:.1f} %",
                f"{done[0]['bytes'] / 1e3:,.0f} kB",
                f"{done[0]['flops'] / dense['flops']:.2f}",
                spread(done, "top1_converted"), spread(done, "top1_calibrated"), final,
            )
        )  # fmt: skip
    title = f"**{model}**: {dense['parameters']:,} parameters, {100 * dense['top1']:.2f} % dense"
    columns = (
        "budget",
        "method",
        "stored",
        "file",
        "FLOPs",
        "converted",
        "calibrated",
        "fine-tuned",
    )
    return f"{title}\n\n{table(columns, rows, words=2)}"


def mean_of(runs: Sequence[Any], key: str) -> float | None:
    """The mean over runs that have the figure."""
    known = [run[key] for run in runs if run.get(key) is not None]
    return statistics.mean(known) if known else None


def spread(runs: Sequence[Any], key: str) -> str:
    """Mean and range over the seeds, in percent."""
    known = [100 * run[key] for run in runs if run.get(key) is not None]
    if not known:
        return ""
    text = f"{statistics.mean(known):.2f}"
    return f"{text} ({min(known):.2f} to {max(known):.2f})" if len(set(known)) > 1 else text


def speed(data: dict[str, Any]) -> str:
    rows = [
        (
            r["model"],
            " ".join(
                [r["scheme"], *(f"{k}={str(v).lower()}" for k, v in r["options"].items())]
            ),
            str(r["batch"]),
            r["what"],
            f"{r['ratio']:.3f} ({r['low']:.3f} to {r['high']:.3f})",
        )
        for r in data["rows"]
    ]  # fmt: skip
    return SPEED.format(
        rounds=data["rounds"],
        torch=data["torch"],
        threads=data["threads"],
        table=table(("model", "scheme", "batch", "what", "tied / dense"), rows, words=2),
    )


def conversion(data: dict[str, Any]) -> str:
    rows = [
        (
            r["what"],
            f"{r['seconds']:.2f}",
            f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})",
            f"{r['peak_over_dense']:.2f}",
            f"{r['imports']:.1f}",
        )
        for r in data["rows"]
    ]
    waited = data.get("plan_seconds")
    plan = ""
    if waited:
        plan = PLAN.format(
            seconds=statistics.median(waited), low=min(waited), high=max(waited),
            rounds=len(waited),
        )  # fmt: skip
    return CONVERSION.format(
        dense=data["dense_bytes"] / 1e6,
        rounds=data["rounds"],
        plan=plan,
        table=table(("", "seconds", "ratio", "peak memory", "imports, seconds"), rows),
    )


if __name__ == "__main__":
    main()
