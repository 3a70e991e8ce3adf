"""Peak memory and time of `convert vit_b_16 --scheme auto --params 50% --calib`, with a baseline.

    python benchmarks/auto_memory.py --baseline CHECKOUT [--images 32] [--effort fast] \\
        [--model timm:vit_base_patch16_224 --model-arg depth=2]

The command runs from this checkout and from another one (`git worktree add CHECKOUT COMMIT`), both
at the same time with one thread each, so that background load affects both alike. Weights are
random, images are noise: neither changes what is computed. Peak memory is the process's own.
The result goes to `benchmarks/results/auto_memory.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

RESULT = Path(__file__).parent / "results" / "auto_memory.json"
HERE = Path(__file__).parents[1]
MEASURED = """
import json, resource, sys, time
start = time.perf_counter()
from tiedconv.cli import main
sys.argv = {words!r}
try:
    main()
except SystemExit as error:
    assert not error.code, error.code
used = resource.getrusage(resource.RUSAGE_SELF)
figures = dict(seconds=time.perf_counter() - start, cpu=used.ru_utime + used.ru_stime,
               peak_mb=used.ru_maxrss / 1024)
open({result!r}, "w").write(json.dumps(figures))
"""


def main() -> None:
    """Run both, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--model-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images(folder / "images", options.images)
        both = {"baseline": options.baseline.resolve(), "this": HERE}
        running = {what: start(what, root, folder, options) for what, root in both.items()}
        for what, process in running.items():
            if process.wait():
                raise SystemExit(f"{what}: {(folder / f'{what}.log').read_text()[-2000:]}")
        found = {what: json.loads((folder / f"{what}.json").read_text()) for what in both}
    record = {
        **found,
        "saved_mb": found["baseline"]["peak_mb"] - found["this"]["peak_mb"],
        "time_ratio": found["this"]["seconds"] / found["baseline"]["seconds"],
        "cpu_ratio": found["this"]["cpu"] / found["baseline"]["cpu"],
        "model": options.model, "model_args": options.model_arg, "images": options.images,
        "effort": options.effort,
        "torch": str(torch.__version__),
    }  # fmt: skip
    options.result.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def start(
    what: str, root: Path, folder: Path, options: argparse.Namespace
) -> subprocess.Popen[Any]:  # fmt: skip
    """The command, from one checkout."""
    words = [
        "tiedconv", "convert", options.model, "--scheme", "auto", "--params", "50%",
        "--weights", "none", "--calib", str(folder / "images"), "--effort", options.effort,
        "--device", "cpu", "--workers", "0", "-o", str(folder / f"{what}.safetensors"),
    ]  # fmt: skip
    words += [word for given in options.model_arg for word in ("--model-arg", given)]
    code = MEASURED.format(words=words, result=str(folder / f"{what}.json"))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (folder / f"{what}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code], env=environment, cwd=root, stdout=log, stderr=log
        )


def images(folder: Path, count: int) -> None:
    """Photos of noise."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(noise.integers(0, 256, (256, 256, 3), np.uint8)).save(folder / f"{i}.jpg")


if __name__ == "__main__":
    main()
