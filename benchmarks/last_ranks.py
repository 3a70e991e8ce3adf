"""Bits of the last ranks of each matrix: whether one price of a parameter is right for all.

    python benchmarks/last_ranks.py --weights VIT.safetensors --data CIFAR10 [--sizes 6 4 3]

Ranks are chosen at one price for each parameter, then all factors are rounded at one step. That is
the optimum in bytes if the ranks that are taken last have as many bits in every matrix, however
many the matrix has on average. The CIFAR ViT is converted with 512 images, `fast`, and the entropy
of the integers of each factor of low rank is taken: of all, and of the last tenth of its ranks.
Results go to `benchmarks/results/last_ranks.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from frontier import MODELS, ours
from safetensors.torch import load_file
from torch import Tensor

from tiedconv.conversion import byte_search
from tiedconv.conversion.rounded_model import RoundedModel
from tiedconv.numerics.rounding import entropy

RESULT = Path(__file__).parent / "results" / "last_ranks.json"
TENTH = 10


def bits_of(rounded: RoundedModel) -> list[tuple[float, float]]:
    """Of each factor of low rank: of its integers, and of those of its last ranks."""
    found = []
    for group in rounded.plan.groups:
        if group.scheme != "lowrank":
            continue
        for factor, shape in group.factors.items():
            rounded_to = rounded.integers.get(group.stored_name(factor))
            if rounded_to is not None:
                values: Tensor = rounded_to.values
                by_rank = values if len(values) == min(shape) else values.t()
                last = by_rank[-max(1, min(shape) // TENTH) :]
                found.append((float(entropy(values)), float(entropy(last))))
    return found


def spread(values: Tensor) -> dict[str, float]:
    """The mean, the standard deviation and the ends."""
    figures = {
        "mean": values.mean(), "deviation": values.std(), "least": values.min(),
        "most": values.max(),
    }  # fmt: skip
    return {name: round(float(value), 2) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", type=int, default=[6, 4, 3])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS["vit-real"](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    rows: list[dict[str, Any]] = []
    best = byte_search._best
    for size in args.sizes:
        seen: list[RoundedModel] = []

        def noted(*given: Any, seen: list[RoundedModel] = seen) -> Any:
            chosen, rounded = best(*given)
            assert rounded is not None  # several plans are compared
            seen.append(rounded)
            return chosen, rounded

        with patch.object(byte_search, "_best", noted):
            ours(model.eval(), images, size, "fast")
        found = torch.tensor(bits_of(seen[0]))
        rows.append({
            "asked": size, "factors": len(found), "all": spread(found[:, 0]),
            "last": spread(found[:, 1]),
        })  # fmt: skip
        print(rows[-1], flush=True)
        args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
