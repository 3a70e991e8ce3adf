"""What a form chosen by few photos is worth on others, and what holding some of them out changes.

    python benchmarks/few_photos.py --weights LITE0.safetensors --data PHOTOS

EfficientNet-Lite0 is converted to 10 % of its bytes by so many of the calibration photos of
`frontier.py`, with `fast`: once as released, where a part of them is held out of the statistics and
plans are compared on all photos, those held out first; and once with statistics of the very photos
that plans are compared on. It is judged on these photos and on the other half of the folder, which
nothing was chosen by. Results go to `benchmarks/results/few_photos.json`, row by row; rows that are
there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from frontier import MODELS, PREPARED, divergence, judged, outputs
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.conversion import byte_search
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.runtime.tie import state_of

RESULT = Path(__file__).parent / "results" / "few_photos.json"
SIZE = 10  # percent of the float32 bytes


class MeasuredOnAll(StatisticsCache):
    """Statistics are of the photos that plans are compared on."""

    def __init__(self, model: Any, calib: Any, data: Any, others: Any = None) -> None:
        super().__init__(model, calib, data, data if others is None else others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS["lite0"](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    expected = outputs(model, images[1])
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []
    order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(0))
    for count in args.images:
        for held_out in (True, False):
            if any(row["images"] == count and row["held_out"] == held_out for row in rows):
                continue
            photos = images[0][order[:count]]
            data = TensorDataset(photos, torch.zeros(count, dtype=torch.int64))
            calib = Calibration(data, count, CalibConfig(effort="fast"), workers=0)
            start = time.process_time()
            cache = StatisticsCache if held_out else MeasuredOnAll
            with patch.object(byte_search, "StatisticsCache", cache):
                tied = tiedconv.convert(
                    model, "auto", bytes=f"{SIZE}%", calib=calib, preprocess=PREPARED["lite0"]
                )
            rows.append({
                "images": count, "held_out": held_out, "asked": SIZE,
                "schemes": sorted({group.scheme for group in state_of(tied).plan.groups}),
                "on_these": round(divergence(outputs(tied, photos), outputs(model, photos)), 5),
                **judged(tied, images, expected),
                "seconds": round(time.process_time() - start),
            })  # fmt: skip
            print(rows[-1], flush=True)
            args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
