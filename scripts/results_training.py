"""The part of `docs/results.md` that is about fine-tuning: its speed, and what each part of the recipe adds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from markdown_table import table
from results_folder import comment_on

TRAINING_SPEED = """## Speed of fine-tuning

{cpu}{gpu}"""

TRAINING_SPEED_CPU = """Time of a step of `tiedconv.training.train`, with all that belongs to it, reading and augmenting the images
included. Each contender is a process of its own, and they take turns; ratios of CPU
time are taken within a round, median and middle 80 %. *Dense*: the same loop on the dense model. *By hand*: a
minimal loop on the dense model with the same recipe. `lors` stores half of the parameters. {device}, {threads}
thread, float32, torch {torch}. The machine is shared. At 224 px contenders keep the memory that a step frees: without, up to
a fifth of a ResNet's step went into page faults by luck, whatever the loop, as in the rows of 96 px.

    python benchmarks/training_speed.py --size 224 --rounds 3 --groups 2

{table}

Aims, at the usual size: tied at most 1.03 and `lors` 1.10 of dense, dense and tied 1.05 of the loop by hand. Images of 96
px have few tokens, so what is done for each weight weighs more: `lors` makes its weights anew in each step.
"""

TRAINING_SPEED_GPU = """On {device} in bfloat16, random bytes, torch {torch}:

    python benchmarks/training_speed.py --device cuda

{table}
"""

RECIPE = """## What each part of the recipe adds: {model}

{model}, `{scheme}` at {params} of its parameters with {calib_images:,} images, then {steps} steps of {batch}; the base recipe is soft
distillation (the library's defaults), crops and flips. Each line changes one thing. Its learning rate, one of {rates},
is chosen after {select_steps} steps by {held_out:,} held-out images; seeds {seeds}: mean, and range in brackets. The model scores
{before:.2f} % before, the original {dense:.2f} %. Nothing is chosen by the test images.

    python benchmarks/recipe.py --data CIFAR10 --vit VIT.safetensors --models MODELS --model {model} --scheme {scheme} \\
        --steps {steps} --select-steps {select_steps} --held-out-images {held_out} --seeds {asked}

{table}

{comment}
"""


def speed(data: dict[str, Any]) -> str:
    done = [row for row in data["rows"] if "error" not in row]
    cpu = [row for row in done if row["device"] == "cpu" and "ratios" in row]
    gpu = [row for row in done if row["device"] == "cuda"]
    parts = {"cpu": "", "gpu": ""}
    if cpu:
        pairs = tuple(cpu[0]["ratios"])
        rows = [
            (
                r["model"], f"{r['size']} px", str(r["batch"]), "yes" if r["teacher"] else "no",
                str(r["rounds"]),
                *(_middle(r["ratios"][pair]["cpu"]) for pair in pairs),
            )
            for r in cpu
        ]  # fmt: skip
        parts["cpu"] = TRAINING_SPEED_CPU.format(
            threads=cpu[0]["threads"],
            device=cpu[0]["device_name"], torch=cpu[0]["torch"],
            table=table(("model", "size", "batch", "teacher", "rounds", *pairs), rows),
        )  # fmt: skip
    if gpu:
        rows = [
            (
                r["model"], r["form"], r["loop"], "yes" if r["compile"] else "no",
                f"{r['images_per_second']:,.0f}", f"{r['peak_bytes'] / 2**30:.2f}",
            )
            for r in gpu
        ]  # fmt: skip
        columns = ("model", "form", "loop", "compiled", "images/s", "peak GiB")
        parts["gpu"] = TRAINING_SPEED_GPU.format(
            device=gpu[0]["device_name"], torch=gpu[0]["torch"], table=table(columns, rows, words=4)
        )
    return TRAINING_SPEED.format(**parts)


def _middle(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"


def recipe(data: dict[str, Any]) -> str:
    found: dict[str, list[Any]] = defaultdict(list)
    for key, run in data["runs"].items():
        found[key.rpartition("/")[0]].append(run)
    base = statistics.fmean(run["top1"] for run in found["base"])
    rows = []
    for name, runs in found.items():
        top1 = [100 * run["top1"] for run in runs]
        mean = statistics.fmean(top1)
        rows.append(
            (
                name, f"{runs[0]['lr']:g}",
                f"{100 * statistics.fmean(run['held_out'] for run in runs):.2f}",
                f"{mean:.2f} ({min(top1):.2f} to {max(top1):.2f})",
                "" if name == "base" else f"{mean - 100 * base:+.2f}",
            )
        )  # fmt: skip
    setting = data["setting"]
    seeds = sorted({key.rpartition("/")[2] for key in data["runs"]})
    return RECIPE.format(
        **{k: setting[k] for k in ("model", "scheme", "params", "calib_images", "steps", "batch",
                                   "select_steps")},
        held_out=setting["held_out_images"],
        rates=", ".join(f"{rate:g}" for rate in setting["rates"]),
        seeds=", ".join(seeds), asked=" ".join(seeds),
        before=100 * data["before"]["compact"]["top1"],
        dense=100 * data["before"]["dense"]["top1"],
        comment=comment_on(f"recipe_{setting['model']}"),
        table=table(("", "rate", "held out", "test", "over base"), rows),
    )  # fmt: skip
