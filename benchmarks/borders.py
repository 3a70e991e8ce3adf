"""What moves into a shifted image decides what a batch norm's statistics are worth.

    python benchmarks/borders.py --data .data/cifar10 --models .data/models

The batch norm statistics of a trained ResNet are re-estimated from 20 batches of 128 training
images: as they are, shifted with their reflection moving in, and shifted with black moving in. No
weight changes. Measured on the test images, for three draws of images and shifts. The result goes
to `benchmarks/results/borders.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from pathlib import Path

import torch
from accuracy import load
from finetuning import recalibrate
from models import Pixels, cropped, read_pixels, top1

RESULT = Path(__file__).parent / "results" / "borders.json"
BATCHES, BATCH = 20, 128
SHIFTS = {"not shifted": None, "reflected": "reflect", "black": "constant"}


def shown(pixels: Pixels, border: str | None, seed: int) -> Pixels:
    """Images drawn by a seed, shifted unless the border is None."""
    generator = torch.Generator().manual_seed(seed)
    drawn = pixels.take(torch.randperm(len(pixels), generator=generator)[: BATCHES * BATCH])
    if border is None:
        return drawn
    return Pixels(cropped(drawn.images, generator, border=border), drawn.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--models", type=Path, default=Path(".data/models"))
    parser.add_argument("--vit", type=Path, help="not used: a ViT has no batch norms")
    parser.add_argument("--model", default="resnet-narrow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="test images, for a trial")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    pixels = read_pixels(args.data)
    test = pixels["test"].some(args.limit)
    model = load(args).eval()
    scores: dict[str, list[float]] = {"stored": [top1(model, test)]}
    for name, border in SHIFTS.items():
        for seed in args.seeds:
            renewed = copy.deepcopy(model)
            recalibrate(renewed, shown(pixels["train"], border, seed), BATCHES, BATCH)
            scores.setdefault(name, []).append(top1(renewed, test))
        print(name, scores[name], flush=True)
    found = {
        "model": args.model, "batches": BATCHES, "batch": BATCH, "seeds": args.seeds,
        "test_images": len(test), "top1": scores,
        "torch": str(torch.__version__), "device": platform.machine(),
    }  # fmt: skip
    args.result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
