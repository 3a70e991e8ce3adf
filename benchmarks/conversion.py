"""Time and memory of conversion, against loading and saving the dense checkpoint.

    python benchmarks/conversion.py [--rounds 5] [--only plan]

Each measurement is a process of its own: the baseline builds vit_b_16, loads its dense
checkpoint, and saves it again; the others run `tiedconv convert` in-process on the same file.
Imports are timed apart. Wall-clock seconds, taken by turns; memory is the peak of the process.
`tiedconv plan vit_b_16` is timed as a user waits for it, from the start of its process to its end.
Results go to `benchmarks/results/conversion.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "conversion.json"

MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
import torch
import tiedconv
from tiedconv.sources.torchvision_compat import import_torchvision
import_torchvision()
imports = time.perf_counter() - start
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
{work}
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps(dict(imports=imports, seconds=seconds, peak_kb=peak, imports_kb=before)))
"""

BASELINE = """
from safetensors.torch import load_file, save_file
import torchvision
model = torchvision.models.vit_b_16()
model.load_state_dict(load_file({dense!r}))
save_file(model.state_dict(), {out!r})
"""

CONVERT = """
from pathlib import Path
from tiedconv.commands.convert_file import convert_file
from tiedconv.planning.recipe import Recipe
convert_file("vit_b_16", Recipe.of({scheme!r}, **{options!r}), Path({out!r}), weights={dense!r},
             force=True)
"""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("tied", {}),
    "lors, rank 64": ("lors", {"rank": 64}),
    "lors, rank 64, match=false": ("lors", {"rank": 64, "match": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["conversion", "plan"])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    record = json.loads(args.result.read_text()) if args.result.is_file() else {}
    if args.only != "conversion":
        record["plan_seconds"] = [plan_seconds() for _ in range(args.rounds)]
        print(record["plan_seconds"], flush=True)
    if args.only != "plan":
        record |= conversions(args.rounds)
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps(record, indent=1) + "\n")


def plan_seconds() -> float:
    """From the start of the command to its end, imports and all."""
    line = [sys.executable, "-m", "tiedconv", "plan", "vit_b_16", "--weights", "none"]
    start = time.perf_counter()
    subprocess.run(line, check=True, capture_output=True)
    return round(time.perf_counter() - start, 2)


def conversions(rounds: int) -> dict[str, Any]:
    """Seconds and memory of each conversion, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        dense, out = f"{folder}/dense.safetensors", f"{folder}/out.safetensors"
        make_dense(dense)
        works = {"load and save": BASELINE.format(dense=dense, out=out)}
        for name, (scheme, options) in CASES.items():
            works[name] = CONVERT.format(scheme=scheme, options=options, dense=dense, out=out)
        figures: dict[str, list[dict[str, float]]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                figures[name].append(measure(work))
        size = Path(dense).stat().st_size
    rows = []
    base = [f["seconds"] for f in figures["load and save"]]
    for name, runs in figures.items():
        ratios = [f["seconds"] / b for f, b in zip(runs, base, strict=True)]
        rows.append(
            {
                "what": name,
                "seconds": round(statistics.median(f["seconds"] for f in runs), 2),
                "ratio": round(statistics.median(ratios), 2),
                "ratio_low": round(min(ratios), 2),
                "ratio_high": round(max(ratios), 2),
                "imports": round(statistics.median(f["imports"] for f in runs), 2),
                "peak_over_dense": round(
                    statistics.median(f["peak_kb"] for f in runs) * 1024 / size, 2
                ),
            }
        )
        print(rows[-1], flush=True)
    return {"model": "vit_b_16", "dense_bytes": size, "rounds": rounds, "rows": rows}


def measure(work: str) -> dict[str, float]:
    """Seconds and peak memory of a piece of work in a process of its own."""
    line = [sys.executable, "-c", MEASURED.format(work=work)]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def make_dense(path: str) -> None:
    """A dense checkpoint of random weights."""
    from safetensors.torch import save_file

    from tiedconv.sources import open_source

    save_file(open_source("vit_b_16", {}, "none")[0].state_dict(), path)


if __name__ == "__main__":
    main()
