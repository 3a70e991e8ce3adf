"""How many images a calibration needs: accuracy against their number.

    python benchmarks/calib_images.py --data .data/cifar10 --models .data/models \\
        --vit .data/vit_cifar10.safetensors --model vit-real --scheme auto --params 30%

A trained model is converted by so many training images, without their labels, and measured on the
test images; no training follows. Each count is drawn again for each seed. A row is written as soon
as it is done, so a stopped run goes on. The result goes to `benchmarks/results/calib_images.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import load
from models import listed, read_pixels, top1

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.conversion.calibrate import Calibration

RESULT = Path(__file__).parent / "results" / "calib_images.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--models", type=Path, default=Path(".data/models"))
    parser.add_argument("--vit", type=Path, default=Path(".data/vit_cifar10.safetensors"))
    parser.add_argument("--model", default="vit-real")
    parser.add_argument("--scheme", default="auto")
    parser.add_argument("--params", default="30%")
    parser.add_argument("--images", type=int, nargs="+", default=[8, 32, 128, 512, 2048])
    parser.add_argument("--efforts", nargs="+", default=["fast", "normal"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--limit", type=int, help="test images, for a trial")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    store: dict[str, Any] = {"rows": {}}
    if args.result.is_file():
        store = json.loads(args.result.read_text())
    store |= {"torch": str(torch.__version__), "device": platform.machine()}
    pixels = read_pixels(args.data)
    test = pixels["test"].some(args.limit)
    model = load(args).eval()
    rows = store["rows"]
    if f"{args.model}/dense" not in rows:
        rows[f"{args.model}/dense"] = {"top1": top1(model, test), "test_images": len(test)}
    for effort in args.efforts:
        for count in args.images:
            for seed in args.seeds:
                key = f"{args.model}/{args.scheme}/{args.params}/{effort}/{count}/{seed}"
                if key in rows:
                    continue
                data = listed(pixels["train"].some(count, seed))
                calib = Calibration(data, count, CalibConfig(effort=effort, seed=seed), "cpu", 0)
                start = time.perf_counter()
                made = tiedconv.convert(model, args.scheme, params=args.params, calib=calib)
                seconds = round(time.perf_counter() - start, 1)
                rows[key] = {"top1": top1(made, test), "seconds": seconds}
                args.result.write_text(json.dumps(store, indent=1) + "\n")
                print(key, rows[key], flush=True)


if __name__ == "__main__":
    main()
