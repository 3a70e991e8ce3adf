"""What each part of a calibrated conversion is worth: each on and off, before any training.

    python benchmarks/ablation.py --data CIFAR10 --vit VIT.safetensors --models MODELS \\
        --model vit-real

Top-1 on the 10,000 test images, and the KL divergence (nats) of the outputs from the original's.
Nothing is chosen by these figures. Calibration reads 1,024 training images without labels. The
result goes to `benchmarks/results/ablation.json` after each run, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accuracy import load
from models import Pixels, listed, normalised, read_pixels
from torch import nn

from tiedconv.calibration import CalibConfig, fit_blocks
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.candidates import memory_store, tie_fit
from tiedconv.conversion.pipeline import plan_on
from tiedconv.conversion.stages import align, fit, measure
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.data import TensorList
from tiedconv.errors import BudgetError, NothingToConvert
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.planning.recipe import Recipe

ROOMY = "85%"
"""Where three bases for four layers are stored, and residuals beside them."""

RESULT = Path(__file__).parent / "results" / "ablation.json"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row of the table.

    Args:
        scheme, params, options: of the recipe.
        metric: what errors are measured by: `none`, `inputs` (whitening), or `both` sides.
        blocks, joint: whether blocks, and then the whole, are fitted.
    """

    scheme: str
    params: str
    options: Mapping[str, Any]
    metric: str = "both"
    blocks: bool = False
    joint: bool = False

    @property
    def name(self) -> str:
        """A key of the result."""
        options = " ".join(f"{k}={v}" for k, v in self.options.items())
        parts = [self.scheme, self.params, options, f"metric {self.metric}"]
        parts += ["blocks"] * self.blocks + ["joint"] * self.joint
        return ", ".join(part for part in parts if part)


def settings(params: str) -> list[Setting]:
    """All rows at a budget: the full conversion of a scheme, and it with one part off."""
    rows: list[Setting] = []
    core = {"base_rank": 0.5}
    for scheme, options in (("lowrank", {}), ("tied", core), ("lors", core), ("basis", {})):
        full = Setting(scheme, params, options, blocks=True, joint=True)
        rows += [
            dataclasses.replace(full, metric="none", blocks=False, joint=False),
            dataclasses.replace(full, metric="inputs", blocks=False, joint=False),
            dataclasses.replace(full, blocks=False, joint=False),
        ]
        if scheme in ("tied", "lors"):
            rows += [
                dataclasses.replace(full, joint=False),
                dataclasses.replace(full, blocks=False),
                dataclasses.replace(full, metric="none"),
                full,
            ]
    plain = Setting("tied", params, core)
    rows += [
        dataclasses.replace(plain, options={**core, "scale": False}),
        dataclasses.replace(plain, options={**core, "match": False}),
        dataclasses.replace(plain, options={}),
        dataclasses.replace(plain, options={**core, "pairing": "vo-qk"}),
        dataclasses.replace(plain, options={**core, "fold": True}),
        Setting("lors", params, {**core, "match": False}),
        Setting("lors", params, {**core, "fold": True}),
        Setting("lors", params, {}),
        *(Setting("lors", ROOMY, {"bases": count}) for count in (1, 2, 3)),
        Setting("basis", params, {"groups": "all"}),
        Setting("basis", params, {"tie": True}),
        Setting("auto", params, {}),
        Setting("auto", params, {"share": False}),
    ]
    return rows


def converted(model: nn.Module, row: Setting, data: TensorList) -> tuple[nn.Module, float]:
    """The compact model, and its stored share of the parameters."""
    planned = plan_on(model, Recipe.of(row.scheme, params=row.params, **row.options))
    info, outlined = planned.info, planned.outlines[0]
    workspace = align(outlined, memory_store(model, info))
    with torch.no_grad():
        statistics = measure(
            outlined, workspace, StatisticsCache(model, Calibration(data, workers=0), data)
        )
        assert statistics is not None
        chosen = {
            "none": {},
            "inputs": {n: KfacMetric(None, m.right) for n, m in statistics.metrics.items()},
        }.get(row.metric, statistics.metrics)
        fitted = fit(info, outlined, workspace, dataclasses.replace(statistics, metrics=chosen))
    compact = copy.deepcopy(model)
    tie_fit(compact, fitted, {})
    config = CalibConfig(
        effort="normal", steps=None if row.blocks else 0, joint_steps=None if row.joint else 0
    )
    fit_blocks(compact, model, data, config, workers=0)
    return compact.cpu().eval(), fitted.plan.stored / fitted.plan.original


@torch.no_grad()
def measured(model: nn.Module, original: nn.Module, pixels: Pixels) -> dict[str, float]:
    """Top-1, and the mean KL divergence of the outputs (nats)."""
    right, divergence = 0, 0.0
    for start in range(0, len(pixels), 500):
        images = normalised(pixels.images[start : start + 500])
        wanted, given = original(images).log_softmax(-1), model(images).log_softmax(-1)
        right += int((given.argmax(1) == pixels.labels[start : start + 500]).sum())
        divergence += float((wanted.exp() * (wanted - given)).sum())
    return {"top1": right / len(pixels), "divergence": divergence / len(pixels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--models", type=Path, default=Path(".data/models"))
    parser.add_argument("--vit", type=Path, default=Path(".data/vit_cifar10.safetensors"))
    parser.add_argument("--model", default="vit-real")
    parser.add_argument("--params", default="30%")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    store = json.loads(args.result.read_text()) if args.result.is_file() else {}
    pixels = read_pixels(args.data)
    calib = pixels["train"].some(args.images)
    data = listed(calib)
    original = load(args).eval()
    runs = store.setdefault(args.model, {"images": args.images})
    if "dense" not in runs:
        runs["dense"] = measured(original, original, pixels["test"])
    for row in settings(args.params):
        if row.name in runs:
            continue
        start = time.perf_counter()
        try:
            compact, ratio = converted(original, row, data)
        except (BudgetError, NothingToConvert) as error:
            runs[row.name] = {"infeasible": str(error)}
            continue
        seconds = round(time.perf_counter() - start, 1)
        runs[row.name] = {
            **measured(compact, original, pixels["test"]), "stored": ratio, "seconds": seconds
        }  # fmt: skip
        args.result.parent.mkdir(exist_ok=True)
        args.result.write_text(json.dumps(store, indent=1) + "\n")
        print(row.name, runs[row.name], flush=True)


if __name__ == "__main__":
    main()
