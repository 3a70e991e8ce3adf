"""The part of `docs/results.md` that is about fits: what each part is worth, and what it costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from markdown_table import ranged, table
from results_folder import comment_on

ABLATION = """## What each part of a calibrated conversion is worth

{model}, top-1 on the 10,000 test images (dense: {dense:.2f} %) and the KL divergence of the outputs from those of the original,
before any training. Nothing was chosen by these figures. `metric`: how errors are weighted, none
(plain distance), inputs (whitening) or both sides (inputs and gradients). {images:,} images.

    python benchmarks/ablation.py --data CIFAR10 --vit VIT.safetensors --model {model} --params 50%

{tables}

{comment}
"""

DATAFREE = """## What each part of the data-free fit is worth

Top-1 right after conversion, without any training, on {images:,} of the training images (the test
images were left for the table above). Dense: {dense:.1f} %.

    python benchmarks/datafree.py --data CIFAR10/train --weights VIT.safetensors

{table}

So `scale` and `match` are on by default and `pairing` is the paper's `kv-qo`. `fold` gains `tied` a
little and costs `lors` and `lowrank` more; it is off.
"""

COST = """## What a calibrated conversion costs

ViT-B/16, {images} random images of 224 px, torch {torch} on {device} with {threads} threads: seconds, the peak memory
of the process until then, and seconds as a share of one forward pass over the same images.

    python benchmarks/calibration_cost.py --images {images}{option}

{table}

{normal}
"""

FORECAST = """A step of a block, of 64 images, took {span_step:.1f} s, one of the whole model {joint_step:.1f} s. `--effort normal` takes
{span_steps} steps for each of {spans} spans and {joint_steps} for the whole: {hours:.1f} hours in all, {ratio:.0f} forward passes. That is a forecast,
from {sample} steps of each on some of the images. On a CPU such a model is one for `--effort fast`.
"""


def ablation(data: dict[str, Any]) -> str:
    parts: list[str] = []
    for model, runs in data.items():
        rows: dict[str, list[Sequence[str]]] = defaultdict(list)  # by budget
        for name, r in runs.items():
            if name in ("images", "dense"):
                continue
            scheme, budget, *rest = name.split(", ")
            figures = ("not reached", "", "")
            if "infeasible" not in r:
                figures = (
                    f"{100 * r['stored']:.1f} %",
                    f"{100 * r['top1']:.2f}",
                    f"{r['divergence']:.3f}",
                )
            rows[budget].append((", ".join((scheme, *rest)), *figures))
        parts.append(
            ABLATION.format(
                model=model, dense=100 * runs["dense"]["top1"], images=runs["images"],
                tables="\n\n".join(
                    table((f"setting, at {budget}", "stored", "top-1", "KL divergence (nats)"), found)
                    for budget, found in rows.items()
                ),
                comment=comment_on("ablation"),
            )
        )  # fmt: skip
    return "\n".join(parts)


IMAGES = """## How many images a calibration needs

Converted by so many training images drawn at random, without labels and without any training after; top-1 on the
test images, mean and range where there are several draws.

    python benchmarks/calib_images.py --data CIFAR10 --models MODELS --vit VIT.safetensors --model MODEL \\
        --scheme auto --params 30%

{table}

{comment}
"""


def images(data: dict[str, Any]) -> str:
    runs: dict[tuple[str, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for key, row in data["rows"].items():
        model, *way = key.split("/")
        if way != ["dense"]:
            scheme, params, effort, count, _ = way
            runs[model, scheme, params, effort][int(count)].append(100 * row["top1"])
    counts = sorted({count for found in runs.values() for count in found})
    rows = [
        (
            model, f"`{scheme}` {params}, `{effort}`",
            f"{100 * data['rows'][f'{model}/dense']['top1']:.1f}",
            *(ranged(found[c], 1) if c in found else "" for c in counts),
        )
        for (model, scheme, params, effort), found in runs.items()
    ]  # fmt: skip
    columns = ("model", "way", "original", *(f"{c:,} images" for c in counts))
    return IMAGES.format(table=table(columns, rows, words=2), comment=comment_on("calib_images"))


FEW = """## Few photos

EfficientNet-Lite0 at {size} % of its bytes by so many photos, `fast`: with statistics of the photos that plans are compared
on, and as released, where some are held out of the statistics. The divergence on the photos themselves, and on 500 others
that nothing was chosen by.

    python benchmarks/few_photos.py --weights LITE0.safetensors --data PHOTOS

{table}
"""


def few(data: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"{r['images']:,}",
            "of a part" if r["held_out"] else "of all",
            " + ".join(r["schemes"]) or "nothing shared",
            f"{r['on_these']:.3f}",
            f"{r['divergence']:.3f}",
            f"{100 * r['agreement']:.1f} %",
            f"{100 * r['top1']:.1f} %",
        )
        for r in data
    ]
    columns = ("photos", "statistics", "form", "KL on these", "KL on others", "same", "top-1")
    return FEW.format(size=data[0]["asked"], table=table(columns, rows, words=3))


def datafree(data: dict[str, Any]) -> str:
    rows = [
        (
            f"`{r['scheme']}`",
            ", ".join(f"{k}={str(v).lower()}" for k, v in r["options"].items()),
            f"{100 * r['ratio']:.1f} %",
            f"{100 * r['top1']:.1f} %",
        )
        for r in data["rows"][1:]
    ]
    return DATAFREE.format(
        images=data["images"],
        dense=100 * data["rows"][0]["top1"],
        table=table(("scheme", "options", "parameters", "top-1"), rows, words=2),
    )


def cost(data: dict[str, Any]) -> str:
    forward = data["parts"]["forward"]["seconds"]
    rows = [
        (name, f"{p['seconds']:.0f}", f"{p['peak_gb']:.1f} GB", f"{p['seconds'] / forward:.2f}")
        for name, p in data["parts"].items()
    ]
    normal, option = "", ""
    if forecast := data.get("forecast"):
        option = f" --sample {data['sample']}"
        hours = data["ratio_normal"] * forward / 3600
        normal = FORECAST.format(
            **{**forecast, "sample": data["sample"], "hours": hours, "ratio": data["ratio_normal"]}
        )
    rows.append(("`--effort fast` in all", "", "", f"{data['ratio_fast']:.2f}"))
    return COST.format(
        images=data["images"], torch=data["torch"], device=data["device"],
        threads=data["threads"], option=option, normal=normal.strip(),
        table=table(("part", "seconds", "peak memory", "forward passes"), rows),
    )  # fmt: skip
