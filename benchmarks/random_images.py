"""A budget of parameters without photos: by the weights alone, or calibrated on random images.

    python benchmarks/random_images.py --model resnet-narrow --weights W.safetensors --data IMAGES

`auto` in floats at some numbers of parameters, judged on the test images. As many images are drawn
as there are photos to calibrate by, whose rows are there to compare with. What the same does for a
budget of bytes is in `frontier.py` (efforts "none" and "random"). Results go to
`benchmarks/results/random_images.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from frontier import MODELS, PREPARED, judged, outputs
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration

RESULT = Path(__file__).parent / "results" / "random_images.json"
WAYS = (("none", ""), ("random", "fast"), ("photos", "fast"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vit-real", "resnet-narrow"), required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--params", nargs="*", type=int, default=(50,))
    args = parser.parse_args()
    model, images = MODELS[args.model](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    expected = outputs(model, images[1])
    photos = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else []
    for params in args.params:
        for data, effort in WAYS:
            key = {"model": args.model, "params": params, "data": data, "effort": effort}
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            calib, start = None, time.process_time()
            if effort:
                given: Any = photos if data == "photos" else "random"
                calib = Calibration(given, len(photos), CalibConfig(effort=effort), workers=0)
            tied = tiedconv.convert(
                model, "auto", params=f"{params}%", calib=calib,
                preprocess=PREPARED[args.model],
            )  # fmt: skip
            seconds = round(time.process_time() - start)
            rows.append({**key, **judged(tied, images, expected), "seconds": seconds})
            print(rows[-1], flush=True)
            RESULT.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
