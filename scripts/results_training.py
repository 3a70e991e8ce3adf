"""The part of `docs/results.md` that is about fine-tuning: its speed, and what each part of the recipe adds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from markdown_table import ranged, table
from results_folder import comment_on

START = """## Fine-tuning never below its start

EfficientNet-Lite0, pretrained, converted by `auto` with `--effort fast` and 250 ImageNet photos, then trained by distillation
alone: 40 steps of 16 of 500 photos. Top-1 on 334 others (the original: 89.2 %). *Before*: a learning rate of 5e-4, batch norms
with the statistics of each batch, the last state. *Now*: the defaults, a rate that is found, norms that keep their statistics
where a batch's harm the teacher, and the state with the least distance to the teacher on held-out photos.

    python benchmarks/finetune_start.py --weights LITE0.safetensors --photos PHOTOS

{table}
"""

TRAINING_SPEED = """## Speed of fine-tuning

{cpu}{gpu}"""

TRAINING_SPEED_CPU = """Time of a step of `tiedconv.training.train`, with all that belongs to it, reading and augmenting the images
included. Each candidate is a process of its own, and they take turns; ratios of CPU
time are taken within a round, median and middle 80 %. *Dense*: the same loop on the dense model. *By hand*: a
minimal loop on the dense model with the same recipe. `lors` stores half of the parameters. {device}, {threads}
thread, float32, torch {torch}. The machine is shared. At 224 px candidates keep the memory that a step frees: without, up to
a fifth of a ResNet's step went into page faults by luck, whatever the loop, as in the rows of 96 px.

    python benchmarks/training_speed.py --size 224 --rounds 3 --groups 2

{table}

Aims, at the usual size: tied at most 1.03 and `lors` 1.10 of dense, dense and tied 1.05 of the loop by hand. Images of 96
px have few tokens, so what is done for each weight weighs more: `lors` computes its weights in each step.
"""

TRAINING_SPEED_GPU = """On {device} in bfloat16, random bytes, torch {torch}:

    python benchmarks/training_speed.py --device cuda

{table}
"""

RECIPE = """## What each part of the recipe adds: {model}

{model}, `{scheme}` at {params} of its parameters with {calib_images:,} images, then {steps} steps of {batch}; the base recipe is soft
distillation (the teacher's share {share:g}), shifts and flips. Each line changes one thing. Its learning rate, one of {rates},
is chosen after {select_steps} steps by {held_out:,} held-out images; seeds {seeds}: mean, and range in brackets. The model scores
{before:.2f} % before, the original {dense:.2f} %. Nothing is chosen by the test images.

    python benchmarks/recipe.py --data CIFAR10 --vit VIT.safetensors --models MODELS --model {model} --scheme {scheme} \\
        --steps {steps} --select-steps {select_steps} --held-out-images {held_out} --seeds {asked} --rates {asked_rates}

{table}

{comment}
"""


EPOCH = """### A whole epoch: {model}

{model}, `{scheme}` at {params} of its parameters with {calib_images:,} images: {before:.2f} % before, the original {dense:.2f} %.
{steps} steps of {batch} ({epochs:.1f} epochs), seed {seeds}, all else as above; a row that names no rate has the best of {rates} after {select_steps} steps.

    python benchmarks/recipe.py --data CIFAR10 --vit VIT.safetensors --models MODELS --model {model} --scheme {scheme} \\
        --steps {steps} --select-steps {select_steps} --held-out-images {held_out} --seeds {asked} \\
        --rates {asked_rates} --only {only} --result {file}

{table}

{comment}
"""

PROGRESSIVE = """## Progressive fine-tuning: blending with the original

{model}, `{scheme}` at {params} of its parameters without any image: {before:.2f} % before, the original {dense:.2f} %. Then
{steps} steps of {batch}, all else as in the recipe above; `progressive` begins at the original and fades it out over this share of
the steps. Seeds {seeds}: mean, and range in brackets.

    python benchmarks/recipe.py --data CIFAR10 --vit VIT.safetensors --model {model} --scheme {scheme} --calib-images 0 \\
        --steps {steps} --select-steps {select_steps} --held-out-images {held_out} --seeds {asked} \\
        --rates {asked_rates} --only base progressive --result recipe_datafree.json

{table}

{comment}
"""

BORDERS = """## What moves into a shifted image

The batch norms of the {model} had their statistics re-estimated from {batches} batches of {batch} training images; no weight
changed. Top-1 on {test_images:,} test images, mean and range over {seeds} draws; `stored`: with the statistics of the file.

    python benchmarks/borders.py --data CIFAR10 --models MODELS

{table}

A border of black is news to a model that never saw one, so `finetune` lets the reflection move in.
"""


def borders(data: dict[str, Any]) -> str:
    rows = [
        (f"`{name}`" if name == "stored" else name, ranged([100 * score for score in scores]))
        for name, scores in data["top1"].items()
    ]
    return BORDERS.format(
        **{k: data[k] for k in ("model", "batches", "batch", "test_images")},
        seeds=len(data["seeds"]),
        table=table(("images shifted", "test"), rows),
    )


def start(rows: list[dict[str, Any]]) -> str:
    """How a training by its defaults ends, and how it ended."""
    cells = [
        [
            row["params"], row["how"], str(row["seed"]), f"{row.get('lr', 5e-4):g}",
            f"{100 * row['start']:.1f} %", f"{100 * row['end']:.1f} %",
            str(row["kept"][0]) if "kept" in row else "last",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ["parameters", "defaults", "seed", "rate", "start", "end", "step kept"]
    return START.format(table=table(columns, cells))


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
    found = _by_row(data)
    base = statistics.fmean(run["top1"] for run in found["base"])
    rows = []
    for name, runs in found.items():
        over = 100 * (statistics.fmean(run["top1"] for run in runs) - base)
        rows.append((name, *_figures(runs), "" if name == "base" else f"{over:+.2f}"))
    return RECIPE.format(
        **_said(data),
        comment=comment_on(f"recipe_{data['setting']['model']}"),
        table=table(("", "rate", "held out", "test", "over base"), rows),
    )


def epoch(data: dict[str, Any]) -> str:
    found, setting = _by_row(data), data["setting"]
    name = "recipe_epoch" if setting["model"] == "vit-real" else "recipe_resnet_epoch"
    rows = sorted(
        ((name, *_figures(runs)) for name, runs in found.items()),
        key=lambda row: (not row[0].startswith("rate"), float(row[1])),
    )
    return EPOCH.format(
        **_said(data),
        epochs=setting["steps"] * setting["batch"] / setting["train_images"],
        only=" ".join(f'"{name}"' for name in sorted(found)),
        file=f"{name}.json",
        comment=comment_on(name),
        table=table(("", "rate", "held out", "test"), rows),
    )


def progressive(data: dict[str, Any]) -> str:
    rows = [(name, *_figures(runs)) for name, runs in _by_row(data).items()]
    return PROGRESSIVE.format(
        **_said(data),
        comment=comment_on("recipe_datafree"),
        table=table(("", "rate", "held out", "test"), rows),
    )


def _by_row(data: dict[str, Any]) -> dict[str, list[Any]]:
    """The runs of each row, one for each seed."""
    found: dict[str, list[Any]] = defaultdict(list)
    for key, run in data["runs"].items():
        found[key.rpartition("/")[0]].append(run)
    return found


def _figures(runs: list[Any]) -> tuple[str, str, str]:
    """Rate, accuracy on held-out images, and on test images with its range."""
    top1 = [100 * run["top1"] for run in runs]
    held_out = 100 * statistics.fmean(run["held_out"] for run in runs)
    return f"{runs[0]['lr']:g}", f"{held_out:.2f}", ranged(top1)


def _said(data: dict[str, Any]) -> dict[str, Any]:
    """What a benchmark of the recipe was about."""
    setting, before = data["setting"], data["before"]
    seeds = sorted({key.rpartition("/")[2] for key in data["runs"]})
    names = ("model", "scheme", "params", "calib_images", "steps", "batch", "select_steps")
    return {
        **{name: setting[name] for name in names},
        "held_out": setting["held_out_images"],
        "share": setting["base"]["distill_weight"],
        "rates": ", ".join(f"{rate:g}" for rate in setting["rates"]),
        "asked_rates": " ".join(f"{rate:g}" for rate in setting["rates"]),
        "seeds": ", ".join(seeds),
        "asked": " ".join(seeds),
        "before": 100 * before["compact"]["top1"],
        "dense": 100 * before["dense"]["top1"],
    }
