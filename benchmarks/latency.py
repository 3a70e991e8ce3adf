"""How well `--latency` keeps its word: predicted and measured time of models of usual sizes.

    python benchmarks/latency.py [--models NAME ...] [--runtimes onnx torch openvino]

Each model has random weights, which take as long as others, and is converted with scheme `lowrank`
to a share of its time. The file is then timed beside the dense model, in turn, each in a process of
its own (`tiedconv bench`). Results go to `benchmarks/results/latency.json`, row by row; rows
that are there are not made again. Accuracy is that of the same plans by multiply-adds, in
`benchmarks/macs.py`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import tiedconv
from tiedconv.commands.bench import timed
from tiedconv.conversion.pipeline import macs_record
from tiedconv.conversion.workload import count_macs
from tiedconv.errors import BudgetError
from tiedconv.planning.budget import RunsOn
from tiedconv.runtime.tie import state_of
from tiedconv.sources.models import open_model
from tiedconv.timing.table import processor

RESULT = Path(__file__).parent / "results" / "latency.json"
MODELS = {
    "ViT-S/16": "timm:vit_small_patch16_224",
    "EfficientNet-Lite0": "timm:tf_efficientnet_lite0",
    "ResNet50": "resnet50",
    "ViT-B/16": "vit_b_16",
}
ASKED = ("0.8x", "0.6x", "0.5x")
ROUNDS = 15


def row(name: str, on: RunsOn, asked: str) -> dict[str, Any]:
    """One conversion: what was predicted, and what it takes."""
    opened = open_model(MODELS[name], weights="none")
    work = count_macs(opened.model, opened.source)
    assert work is not None
    found: dict[str, Any] = {"model": name, **on.to_json(), "asked": asked}
    try:
        model = tiedconv.convert(MODELS[name], "lowrank", weights="none", latency=asked, on=on)
    except BudgetError as error:
        return {**found, "refused": error.code, "least_ns": error.smallest}
    state = state_of(model)
    record, macs = state.history[0]["latency"], macs_record(state.plan, work)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compact.safetensors"
        tiedconv.save(model, path)
        timing = timed(path, on, ROUNDS)
    return {
        **found,
        "predicted": record["predicted_ns"] / record["original_ns"],
        "measured": timing.ratio,
        "low": timing.low,
        "high": timing.high,
        "dense_ms": record["original_ns"] / 1e6,
        "macs": macs["converted"] / macs["original"],
        "params": state.plan.stored / state.plan.original,
    }


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", default=["onnx", "torch", "openvino"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--asked", nargs="+", default=list(ASKED))
    given = parser.parse_args()
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": []}
    kept["processor"] = processor()
    for name in given.models:
        for runtime in given.runtimes:
            for batch in given.batches:
                for threads in given.threads:
                    for asked in given.asked:
                        on = RunsOn(runtime, batch, threads)
                        about = {"model": name, **on.to_json(), "asked": asked}
                        if any(about.items() <= known.items() for known in kept["rows"]):
                            continue
                        kept["rows"].append(row(name, on, asked))
                        print(kept["rows"][-1], flush=True)
                        RESULT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
