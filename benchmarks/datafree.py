"""What each part of the data-free fit is worth: accuracy right after conversion.

    python benchmarks/datafree.py --data CIFAR10/train --weights VIT.safetensors

The ViT of `vit_cifar10.py`, converted with parts of the mathematics on and off, and measured
without any training on 2,000 of the training images (the test images are left for the end).
Results go to `benchmarks/results/datafree.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vit_cifar10 import ARGS, PREPROCESS, SPEC

import tiedconv
from tiedconv.data import ImageList, eval_transform, open_images
from tiedconv.sources import open_source
from tiedconv.training import evaluate_model

RESULT = Path(__file__).parent / "results" / "datafree.json"
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("tied", {}),
    ("tied", {"scale": False}),
    ("tied", {"match": False}),
    ("tied", {"scale": False, "match": False}),
    ("tied", {"fold": True}),
    ("tied", {"pairing": "vo-qk"}),
    ("tied", {"rank": 16}),
    ("tied", {"groups": "adjacent:2", "params": "50%"}),
    ("lors", {"params": "50%"}),
    ("lors", {"params": "50%", "match": False}),
    ("lors", {"params": "50%", "fold": True}),
    ("lors", {"params": "30%"}),
    ("shared", {}),
    ("shared", {"match": False}),
    ("lowrank", {"params": "50%"}),
    ("lowrank", {"params": "50%", "fold": True}),
    ("lowrank", {"params": "30%"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    dense, _ = open_source(SPEC, ARGS, args.weights)
    images = open_images(args.data, limit=args.limit)
    data = ImageList(images, eval_transform(PREPROCESS))

    def accuracy(model: Any) -> float:
        return round(evaluate_model(model, data, workers=0, batch_size=256).top1, 4)

    rows = [{"scheme": "dense", "options": {}, "ratio": 1.0, "top1": accuracy(dense)}]
    for scheme, options in CASES:
        model = tiedconv.convert(dense, scheme, **options)
        ratio = round(tiedconv.report(model).ratio, 4)
        rows.append({"scheme": scheme, "options": options, "ratio": ratio, "top1": accuracy(model)})
        print(rows[-1], flush=True)
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps({"images": len(images), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
