"""Accuracy at equal multiply-adds: `auto --macs` and torch-pruning, before and after training.

    pip install -r benchmarks/accuracy_requirements.txt
    python benchmarks/macs_trained.py --weights VIT.safetensors --data CIFAR10

The ViT that someone else trained on CIFAR-10. `auto --macs` is calibrated on 512 training images
without labels (effort `fast`); torch-pruning ranks by gradients on 512, for which it gets their
labels, and is asked for the multiply-adds that our model has; its better form counts (uniform or
isomorphic, by the divergence on the calibration images). Then both get the same training: the loop
and the defaults of `finetune`, 60 steps of 64 training images without labels, the original as
teacher, the state of the least loss on 512 held-out images; the learning rate is found by the
default's test, for torch-pruning also the better of that and of two others, by the held-out loss.
Judged on all test images, three seeds. Multiply-adds are those that `torch.utils.flop_counter`
counts while a model runs. Results go to `benchmarks/results/macs_trained.json`, row by row.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import baselines
import torch
from finetuning import Teacher
from frontier import divergence, judged, outputs, vit_real
from frontier_trained import data_of
from models import normalised, read_pixels
from narrow import multiply_adds, pruned
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.training import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "macs_trained.json"
ASKED = (75, 60, 50)
STEPS, RATES = 60, (1e-4, 5e-4)


def counted(model: nn.Module, images: torch.Tensor) -> int:
    """Multiply-adds of one image, a tied model's with factors applied where that takes fewer."""
    run = copy.deepcopy(model).requires_grad_(False)
    if tiedconv.runtime.tie.is_tied(run):
        tiedconv.apply_factors(run, cache=True)
    return multiply_adds(run, images)


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    model, images = vit_real(args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    pixels = read_pixels(args.data)
    learned, held = data_of(pixels["train"]), data_of(pixels["val"].some(512), "none")
    context = baselines.Context(
        "vit-real", model, Teacher(model), pixels, pixels["train"].some(512)
    )  # fmt: skip
    expected = outputs(model, images[1])
    later = normalised(pixels["val"].some(512).images)
    wanted = outputs(model, later)
    whole = multiply_adds(model, images[0])
    rows: list[dict[str, Any]] = json.loads(RESULT.read_text()) if RESULT.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        RESULT.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")

    shown = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
    for asked in ASKED:
        calib = Calibration(shown, len(shown), CalibConfig(effort="fast"), "cpu", 0)
        ours = tiedconv.convert(model, "auto", macs=f"{asked}%", calib=calib)
        limit = counted(ours, images[0])
        for method in ("auto", "torch-pruning"):
            key = {"model": "vit-real", "method": method, "asked": asked}
            if sum(key.items() <= row.items() for row in rows) == 1 + args.seeds:
                continue
            made = ours if method == "auto" else pruned(context, images[0], limit)
            share = round(counted(made, images[0]) / whole, 4)
            add({**key, "steps": 0, "macs": share, **judged(made.eval(), images, expected)})
            for seed in range(args.seeds):
                best: tuple[float, Any, nn.Module] | None = None
                for lr in (None,) if method == "auto" else (None, *RATES):
                    student = copy.deepcopy(made)
                    config = TrainConfig(
                        steps=args.steps, epochs=None, batch_size=64, distill_weight=1.0, lr=lr,
                        seed=seed, workers=0, eval_every_epoch=False, augment="crop",
                    )  # fmt: skip
                    result = train(student, learned, held, config, teacher=model, device="cpu")
                    apart = divergence(outputs(student.eval(), later), wanted)
                    if best is None or apart < best[0]:
                        best = apart, result, student
                assert best is not None
                _, result, student = best
                add({
                    **key, "steps": args.steps, "seed": seed, "macs": share, "lr": result.lr,
                    **judged(student, images, expected),
                })  # fmt: skip


if __name__ == "__main__":
    main()
