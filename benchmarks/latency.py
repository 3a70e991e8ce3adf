"""How well `--latency` keeps its word: predicted and measured time of models of usual sizes.

    python benchmarks/latency.py [--models NAME ...] [--runtimes torch compiled onnx openvino]
        [--batches 1 8] [--threads 1 2] [--ratios 0.8x 0.6x 0.5x]

Each model has random weights, which take as long as others, and is converted with scheme `lowrank`
to shares of its time. The files of all shares are then timed beside the dense model, all in turn in
every round, each in a process of its own: ratios are taken within a round, and their median and
middle 80 % are kept. `compiled` is what `torch.compile` makes of the models for `torch`, after
`optimize`; the prediction is that of eager PyTorch. Results go to
`benchmarks/results/latency.json`; a model, runtime, batch and threads are done at a time, and
rows that are there are not made again. Accuracy against time is in `benchmarks/accuracy_time.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tiedconv
from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands.export import export
from tiedconv.conversion.pipeline import macs_record
from tiedconv.conversion.workload import count_macs
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError
from tiedconv.exporters import all_formats
from tiedconv.planning.budget import RunsOn
from tiedconv.runtime.example_inputs import usual_inputs
from tiedconv.runtime.tie import state_of
from tiedconv.sources.models import load, open_model
from tiedconv.timing.table import processor

RESULT = Path(__file__).parent / "results" / "latency.json"
MODELS = {
    "ViT-S/16": "timm:vit_small_patch16_224",
    "EfficientNet-Lite0": "timm:tf_efficientnet_lite0",
    "ResNet50": "resnet50",
    "ViT-B/16": "vit_b_16",
}
RUNTIMES = ("torch", "compiled", "onnx", "openvino")
RATIOS = ("0.8x", "0.6x", "0.5x")
ROUNDS, SIZE = 15, 224


def converted(spec: str, on: RunsOn, ratio: str, work: Workload, path: Path) -> dict[str, Any]:
    """Write a file of a share of the time; what was predicted of it, or why there is none."""
    try:
        model = tiedconv.convert(spec, "lowrank", weights="none", latency=ratio, on=on)
    except BudgetError as error:
        return {"refused": error.code, "least_ns": error.smallest}
    state = state_of(model)
    record, macs = state.history[0]["latency"], macs_record(state.plan, work)
    tiedconv.save(model, path)
    return {
        "predicted": record["predicted_ns"] / record["original_ns"],
        "rehearsed": True,  # a model of the plan was timed before the fit
        "dense_ms": record["original_ns"] / 1e6,
        "macs": macs["converted"] / macs["original"],
        "params": state.plan.stored / state.plan.original,
    }


def targets(
    files: Sequence[Path], dense: Any, runtime: str, threads: int
) -> list[BenchTarget]:  # fmt: skip
    """The dense model of some files, and each of these, ready to be timed in a runtime."""
    how: dict[str, Any] = {"threads": threads, "shape": (3, SIZE, SIZE)}
    if runtime in ("torch", "compiled"):
        is_eager = runtime == "torch"
        plain, fast = ("eager", "optimized") if is_eager else ("compiled", "compiled-optimized")
        found = [BenchTarget(str(files[0]), plain, dense=True, **how)]
        return [*found, *(BenchTarget(str(file), fast, **how) for file in files)]
    form = all_formats()[runtime]
    plain_file = files[0].with_name(f"dense{form.endings[0]}")
    image = next(usual_inputs(dense)[0]).new_zeros(2, 3, SIZE, SIZE)
    form.write_plain(dense, image, plain_file)
    found = [BenchTarget(str(plain_file), runtime, **how)]
    for file in files:
        exported = file.with_suffix(form.endings[0])
        export(file, exported, runtime)
        found.append(BenchTarget(str(exported), runtime, **how))
    return found


def ratios(targets: Sequence[BenchTarget], batch: int, rounds: int) -> list[list[float]]:
    """Times of all targets but the first, divided by the first's in the same round, in order."""
    with contextlib.ExitStack() as stack:
        started = []
        for target in targets:
            process = Process(target)
            stack.callback(process.close)
            process.load()
            process.run(batch)  # kernels are chosen, code compiled
            started.append(process)
        times = [[process.run(batch) for process in started] for _ in range(rounds)]
    return [sorted(row[i] / row[0] for row in times) for i in range(1, len(targets))]


def cell(
    name: str, runtime: str, on: RunsOn, asked: Sequence[str], rounds: int
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one model, runtime, batch size and number of threads."""
    opened = open_model(MODELS[name], weights="none")
    work = count_macs(opened.model, opened.source)
    assert work is not None
    about = {"model": name, **on.to_json(), "on": runtime}
    rows, files = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for ratio in asked:
            path = Path(folder) / f"{ratio}.safetensors"
            facts = converted(MODELS[name], on, ratio, work, path)
            rows.append({**about, "asked": ratio, **facts})
            if path.exists():
                files[ratio] = path
        if files:
            dense = tiedconv.untie(load(next(iter(files.values())))).eval()
            timed = targets([*files.values()], dense, runtime, on.threads)
            found = dict(zip(files, ratios(timed, on.batch_size, rounds), strict=True))
            for row in rows:
                if (each := found.get(row["asked"])) is not None:
                    edge = len(each) // 10
                    row |= {
                        "measured": statistics.median(each), "low": each[edge],
                        "high": each[-1 - edge], "load": round(os.getloadavg()[0], 1),
                    }  # fmt: skip
    return rows


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    kept = json.loads(given.result.read_text()) if given.result.exists() else {"rows": []}
    kept |= {"processor": processor(), "rounds": given.rounds}
    cells = itertools.product(given.models, given.runtimes, given.batches, given.threads)
    for name, runtime, batch, threads in cells:
        on = RunsOn("torch" if runtime == "compiled" else runtime, batch, threads)
        about = {"model": name, **on.to_json(), "on": runtime}
        done = {row["asked"] for row in kept["rows"] if about.items() <= row.items()}
        if missing := [ratio for ratio in given.ratios if ratio not in done]:
            for row in cell(name, runtime, on, missing, given.rounds):
                kept["rows"].append(row)
                print(row, flush=True)
            given.result.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
