"""The part of `docs/results.md` that is about bytes: accuracy at equal sizes of real files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_table import table
from results_folder import comment_on

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

(The picture shows `--effort normal`, of Lite0 and the ViT-S/14 `fast`.)

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
TRAINED = """### Where training takes part

The two models of CIFAR-10 and 512 calibration images; every method then gets the same training: the loop of `finetune`, {steps} steps of 64
training images without labels, the original as teacher, the state of the least loss on 512 held-out training images. `auto`
begins at `--bytes` (`fast`) and trains its integers, at the learning rate that the default finds; the others have the better
of that rate and 5e-5 on the held-out images of seed 0. *QAT*: the dense model in integers with trained scales, begun at its
GPTQ form. *SVD*: whitened, then 8 bits a row. Top-1 on the test images, mean of {seeds} seeds (least to most).

{models}
"""

TRAINED_MODELS = {"vit-real": "The ViT:", "resnet-narrow": "The bottleneck ResNet:"}
TRAINED_COMMAND = "    python benchmarks/frontier_trained.py --model {model} --weights W.safetensors --data CIFAR10"

ABLATION = """### What each part is worth

The same ViT, calibrated with the same images, nothing trained; each row leaves out or replaces one part of
`auto --bytes`. The search lowers the divergence (KL); top-1 follows it but for some tenths of chance.

    python benchmarks/frontier_ablation.py --weights VIT.safetensors --data CIFAR10

{table}

{comment}
"""

PACKED = """### Files, memory and time

ViT-S/14 (112 px) and EfficientNet-Lite0 (224 px), `auto --bytes`, calibrated with 64 photos (`fast`); the second file of each with
`--bits 4`. *Overhead*: bytes of the compact file over those of its tensors. *ONNX* and *OpenVINO*: bytes of the exported
file over those of the tensors with packed integers, as PyTorch holds them, and how far outputs are from ours, of the largest
output. Then the memory that a loaded model holds, and the time of a forward pass (batch 1; median of {rounds} turns), each over
those of the dense float32 model in the same runtime: *packed* computes weights when they are used, *cached* is
`freeze`, *ONNX* is ONNX Runtime at its defaults, *OpenVINO* in float32 but for features, which it may round to 8 bits. One thread, {processor}.

    python benchmarks/packed.py --dinov2 FOLDER --lite0 LITE0.safetensors --photos PHOTOS

{files}

{runs}

{comment}
"""

HOW = {
    "auto": "`auto --bytes`", "qat": "QAT", "svd8": "SVD, 8 bits", "pruned8": "torch-pruning, 8 bits",
}  # fmt: skip
COMMAND = (
    "    python benchmarks/frontier.py --model {model} --weights WEIGHTS.safetensors --data IMAGES"
)
METHODS = ("nearest", "gptq", "nncf", "torchao")


WITHOUT = {"none": "without images", "random": "`--calib random`, normal"}


def frontier(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each model."""
    return BYTES.format(models="\n\n".join(filter(None, (_model(rows, m) for m in NAMES))))


def trained(rows: Sequence[dict[str, Any]]) -> str:
    """For each model a line for each method and size, seeds together."""
    seeds = 1 + max(row["seed"] for row in rows)
    parts = []
    for model, head in TRAINED_MODELS.items():
        if mine := [row for row in rows if row["model"] == model]:
            parts += [head, TRAINED_COMMAND.format(model=model), _trained(mine)]
    return TRAINED.format(models="\n\n".join(parts), steps=rows[0]["steps"], seeds=seeds)


def _trained(rows: Sequence[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], str(row["asked"])), []).append(row)
    cells = []
    for (method, _), mine in sorted(groups.items(), key=lambda g: -float(g[1][0]["percent"])):
        tops = [100 * row["top1"] for row in mine]
        apart = sum(row["divergence"] for row in mine) / len(mine)
        width = f", {mine[0]['asked'][0]} bits" if method == "qat" else ""
        spread = f"{sum(tops) / len(tops):.2f} % ({min(tops):.2f} to {max(tops):.2f})"
        cells.append([f"{mine[0]['percent']:.2f} %", HOW[method] + width, spread, f"{apart:.4f}"])
    return table(["file", "method", "top-1", "KL"], cells)


def ablation(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each setting, a column for each size."""
    sizes = sorted({row["asked"] for row in rows}, reverse=True)
    found = {(row["setting"], row["asked"]): row for row in rows}
    cells = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        line = [setting]
        for size in sizes:
            row = found.get((setting, size), {})
            top = f"{100 * row['top1']:.2f} %" if "top1" in row else row.get("error", "-")
            line += [top, f"{row['divergence']:.4f}" if "divergence" in row else "-"]
        cells.append(line)
    columns = ["setting"]
    for size in sizes:
        columns += [f"{size} %", "KL"]
    return ABLATION.format(table=table(columns, cells), comment=comment_on("frontier_ablation"))


def packed(rows: Sequence[dict[str, Any]]) -> str:
    """A table of sizes, and one of memory and time."""
    names = {"dinov2": "ViT-S/14", "lite0": "EfficientNet-Lite0"}
    files, runs = [], []
    for row in rows:
        name = names[row["model"]] + ("" if row["bits"] is None else f", `--bits {row['bits']}`")
        line = [name, f"{row['file_bytes'] / 1e6:.2f} MB", f"{row['to_payload']:.4f}"]
        for kind in ("onnx", "openvino"):
            found = row["exports"][kind]
            line += [f"{found['to_packed']:.3f}", f"{found['off']:.0e}"]
        files.append(line)
        runs.append([name, *_runs(row["rows"])])
    columns = ["model", "file", "overhead", "ONNX", "off by", "OpenVINO", "off by"]
    return PACKED.format(
        rounds=rows[0]["rounds"], processor=rows[0]["processor"], files=table(columns, files),
        runs=table(["model", *(f"{label}: memory, time" for label, _ in RUNS)], runs),
        comment=comment_on("packed"),
    )  # fmt: skip


RUNS = (
    ("packed", ("eager", "eager")), ("cached", ("eager", "cached")), ("ONNX", ("onnx", "onnx")),
    ("OpenVINO", ("openvino", "openvino")),
)  # fmt: skip


def _runs(rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for _, (baseline, name) in RUNS:
        dense = next(r for r in rows if r["runtime"] == baseline and r["model"] == "dense")
        own = [r for r in rows if r["runtime"] == name and r["model"] == "compact"]
        if not own:
            cells.append("-")
            continue
        time = own[0]["timings"][0]
        memory = own[0]["held_bytes"] / dense["held_bytes"]
        cells.append(f"{memory:.2f}, {time['ratio']:.2f} ({time['low']:.2f} to {time['high']:.2f})")
    return cells


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
        for effort in ("none", "random", "fast", "normal", "thorough"):
            for row in mine:
                if row.get("asked") == size and row.get("effort") == effort:
                    how = WITHOUT.get(row["effort"], f"`--calib`, {row['effort']}")
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
