"""Write `docs/results.md` from `benchmarks/results/*.json`, so that no figure is typed by hand.

python scripts/results_docs.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

HEAD = """# Results

Made by `scripts/results_docs.py` from `benchmarks/results/*.json`. Each table names the command
that measures it.
"""

CIFAR = """## Accuracy on real input: a ViT that someone else trained, at half its parameters

CIFAR-10 as JPEG files, 50,000 training and 10,000 test images; a ViT of depth 4 and width 128 in
timm's names, 546,186 parameters, 69.65 % of the test images right. Each compact model is made
without data and healed for {steps} steps of {batch} images ({images:,} images, half an epoch) with the
original as teacher (temperature {temperature}, weight {distill}, random crops and flips, AdamW). The dense model is
trained on for the same steps, from labels alone and with itself as teacher. The learning rate is
the best of {rates} after {select_steps} steps, on a tenth held out of the training images: chosen once for
all compact models (by `tied`) and once for each dense one. Seeds: {seeds}.

    python benchmarks/vit_cifar10.py --data CIFAR10 --weights VIT.safetensors

{table}

For one row by hand (`tied`):

    tiedconv convert timm:vit_tiny_patch16_224 --model-arg img_size=32 --model-arg patch_size=4 \\
        --model-arg embed_dim=128 --model-arg depth=4 --model-arg num_heads=4 \\
        --model-arg mlp_ratio=2 --model-arg num_classes=10 --weights VIT.safetensors \\
        --image-size 32 --resize 0 --mean .4914,.4822,.4465 --std .2470,.2435,.2616 \\
        --scheme tied -o tied.safetensors
    tiedconv finetune tied.safetensors --data CIFAR10 -o healed.safetensors \\
        --teacher VIT.safetensors --steps {steps} --batch-size {batch} --lr {tied_lr}

`tied` alone can't store less than {tied_ratio} of this model (its kept tensors weigh more than a larger
ViT's); `tied-50` shares one W among pairs of blocks (`groups=adjacent:2`) and spends the rest of
its half on residuals.

What the figures say: {comment}
"""

DATAFREE = """## What each part of the data-free fit is worth

Top-1 right after conversion, without any training, on {images:,} of the training images (the test
images were left for the table above). Dense: {dense:.1f} %.

    python benchmarks/datafree.py --data CIFAR10/train --weights VIT.safetensors

{table}

So `scale` and `match` are on by default and `pairing` is the paper's `kv-qo`. `fold` gains `tied` a
little and costs `lors` and `lowrank` more; it is off.
"""

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
"""


def main() -> None:
    parts = [HEAD]
    for name, section in (
        ("vit_cifar10", cifar),
        ("datafree", datafree),
        ("speed", speed),
        ("conversion", conversion),
    ):
        path = RESULTS / f"{name}.json"
        if path.is_file():
            parts.append(section(json.loads(path.read_text())))
    notes = RESULTS / "notes.md"
    if notes.is_file():
        parts.append(notes.read_text("utf-8"))
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), "utf-8")


def cifar(data: dict[str, Any]) -> str:
    setting, runs = data["setting"], data["runs"]
    rows = accuracy_rows(runs)
    return CIFAR.format(
        steps=setting["steps"], batch=setting["batch_size"],
        images=setting["steps"] * setting["batch_size"], temperature=setting["temperature"],
        distill=setting["distill"], select_steps=setting["select_steps"],
        rates=", ".join(f"{r:g}" for r in setting["rates"]),
        seeds=seed_counts(runs),
        table=table(
            ("model", "parameters", "", "file", "before training", "after", "learning rate"), rows
        ),
        tied_lr=f"{runs['final/tied/0']['lr']:g}",
        tied_ratio=f"{100 * runs['final/tied/0']['parameters'] / 546186:.1f} %",
        comment=(RESULTS / "vit_cifar10_comment.txt").read_text("utf-8").strip(),
    )  # fmt: skip


def seed_counts(runs: dict[str, Any]) -> str:
    """How many seeds there are; a model with more than one shows their range."""
    names = {k.split("/")[1] for k in runs if k.startswith("final/")}
    counts = {n: sum(k.startswith(f"final/{n}/") for k in runs) for n in names}
    return str(min(counts.values())) + (
        " (more where a range is shown)" if max(counts.values()) > min(counts.values()) else ""
    )


def accuracy_rows(runs: dict[str, Any]) -> list[Sequence[str]]:
    """One row for each model, the mean over its seeds with their range."""
    names = list(dict.fromkeys(k.split("/")[1] for k in runs if k.startswith("final/")))
    names.sort(key=lambda n: (not n.startswith("dense"), n))
    rows: list[Sequence[str]] = [
        ("dense, as it came", "546,186", "100 %", "2.19 MB", "69.65 %", "", "")
    ]
    for name in names:
        mine = [v for k, v in runs.items() if k.startswith(f"final/{name}/")]
        tops = [100 * m["top1"] for m in mine]
        spread = f" ({min(tops):.2f} to {max(tops):.2f})" if len(tops) > 1 else ""
        rows.append(
            (
                {"dense": "dense, trained on", "dense, own teacher": "dense, own teacher"}.get(
                    name, f"`{name}`"
                ),
                f"{mine[0]['parameters']:,}",
                f"{100 * mine[0]['parameters'] / 546186:.1f} %",
                f"{mine[0]['bytes'] / 1e6:.2f} MB",
                f"{100 * statistics.mean(m['before'] for m in mine):.2f} %",
                f"{statistics.mean(tops):.2f} %{spread}",
                f"{mine[0]['lr']:g}",
            )
        )
    return rows


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
    return CONVERSION.format(
        dense=data["dense_bytes"] / 1e6,
        rounds=data["rounds"],
        table=table(("", "seconds", "ratio", "peak memory", "imports, seconds"), rows),
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; columns after the first `words` are figures."""
    marks = ["---" if i < words else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, marks, *rows))


if __name__ == "__main__":
    main()
