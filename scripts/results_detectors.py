"""The part of `docs/results.md` that is about detectors."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from markdown_table import table
from results_folder import comment_on

DETECTION = """## A pretrained detector: DEIMv2-Atto on COCO

{photos} validation photos of COCO, average precision (AP, pycocotools) and AP50 in per cent; so few photos
tell differences of a point or two, and no less. The original is DEIMv2-Atto, pretrained on COCO by its
authors: {whole:,} parameters, {decoder:,} of them in its three decoder layers, which is what is
converted. Budgets are shares of these. *Without data*: the fit of weights alone. *Calibrated*: with 128 other
photos, their boxes unseen, `--effort {effort}`. *Distilled*: then {epochs:g} epochs of the same photos in batches of
{batch}, by the outputs of the original alone (`--distill 1 --only '*decoder*'`, rate {lr:g}, not tuned). The whole of it
took {minutes} on one busy core for each line.

    python examples/deimv2/model.py deimv2_atto_coco_deploy_statedict.safetensors atto.safetensors
    python benchmarks/detection.py --weights atto.safetensors --data COCO128 --onnx deimv2_atto.onnx

{table}

![Boxes of the original and of compact models](detection.jpg)

Boxes with a score above 0.4 on four photos of COCO's val2017 (images.cocodataset.org; the photos are their
photographers', under the licences that COCO's annotations name).

{comment}
"""

OVERFIT = """## AdaMixer with LORS: does it learn, and what is a fitted start worth?

A narrow AdaMixer, overfitted on eight photos of COCO ({setting}), {steps} steps of 4 photos, the same
seeds; AP on these photos.

    python examples/adamixer/overfit.py --photos COCO/train2017 --annotations COCO/instances_train2017.json

{runs}

The trained decoder with dense generators, converted by `lors` and `lors-adaptive` at the ranks of the paper's
recipe: with residuals fitted to the generators, and with the base alone (zero residuals, as the paper begins).
*Content* is the relative error of the queries after each stage, *logits* that of the last stage's logits.

{starts}

![AP against steps](../examples/adamixer/overfit.png)
"""

TIME = """## Time and memory of AdaMixer's decoder

At full size, one image, 1 thread, torch {torch}: {measure}, by turns, {rounds} rounds. *Stock* is AdaMixer's own
setting (110.27 M parameters), *wide* the setting that LORS' authors use, without LORS (135.54 M), *lors* the same
with LORS (35.35 M), *applied* after `apply_factors`, *frozen* after `freeze`. The machine had other work as well.

    python examples/adamixer/speed.py --rounds {rounds}

{table}

LORS stores a third and takes half of the memory, but not less time: shared weights are read in every stage.
"""


def detection(data: dict[str, Any]) -> str:
    """DEIMv2-Atto."""
    runs, settings = dict(data["runs"]), data["settings"]
    rows = [("original", "-", f"{settings['whole']:,}", "", "", _score(runs.pop("dense")))]
    onnx = runs.pop("onnx", None)
    if onnx is not None:
        rows.append(("its authors' ONNX file", "-", "", "", "", f"{100 * onnx['ap']:.1f}"))
    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for key, run in runs.items():
        scheme, share, _ = key.split("/")
        groups[scheme, share].append(run)
    for (scheme, share), found in groups.items():
        steps = [
            _mean([run[step] for run in found]) for step in ("free", "calibrated", "distilled")
        ]
        rows.append((scheme, f"{share} %", f"{found[0]['parameters']:,}", *map(_score, steps)))
    minutes = [run["distilled_seconds"] / 60 for found in groups.values() for run in found]
    return DETECTION.format(
        photos=128, minutes=f"{max(minutes):.0f} minutes at most",
        comment=comment_on("detection"),
        table=table(
            ("", "decoder", "parameters", "without data", "calibrated", "distilled"), rows, words=1
        ),
        **settings,
    )  # fmt: skip


def overfit(data: dict[str, Any]) -> str:
    """AdaMixer on eight photos."""
    runs = [
        (name, f"{run['parameters']:,}", f"{run['curve'][-1]['ap']:.3f}",
         f"{run['curve'][-1]['ap50']:.3f}", f"{run['curve'][-1]['loss']:.2f}")
        for name, run in data["runs"].items()
    ]  # fmt: skip
    starts = [
        (name, ", ".join(f"{e:.2f}" for e in start["stages"]), f"{start['logits']:.3f}",
         f"{start['ap50']:.3f}", f"{start['curve'][-1]['ap50']:.3f}")
        for name, start in data["starts"].items()
    ]  # fmt: skip
    after = next(iter(data["starts"].values()))["curve"][-1]["step"]
    return OVERFIT.format(
        setting=", ".join(f"{name} {value}" for name, value in data["setting"].items()),
        steps=data["steps"],
        runs=table(("decoder", "parameters", "AP", "AP50", "loss"), runs),
        starts=table(
            ("start", "content, stages 1 to 6", "logits", "AP50 at once", f"after {after} steps"),
            starts, words=2,
        ),
    )  # fmt: skip


def times(data: dict[str, Any]) -> str:
    """AdaMixer's decoder."""
    sizes = list(data["forward"])
    rows = [
        (
            name,
            *(
                f"{data['forward'][size][name]['ratio']:.2f} "
                f"({data['forward'][size][name]['low']:.2f} to "
                f"{data['forward'][size][name]['high']:.2f})"
                for size in sizes
            ),
            f"{peak / 1e6:.0f} MB",
        )
        for name, peak in data["peak_bytes"].items()
    ]
    made = table(("", *(f"time, {size} px" for size in sizes), "peak memory"), rows)
    return TIME.format(
        torch=data["torch"], measure=data["measure"], rounds=data["rounds"], table=made
    )


def _mean(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(score[key] for score in scores) for key in scores[0]}


def _score(score: dict[str, float]) -> str:
    return f"{100 * score['ap']:.1f} / {100 * score['ap50']:.1f}"
