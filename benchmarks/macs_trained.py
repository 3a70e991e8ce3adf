"""Accuracy at equal multiply-adds: `auto --macs` and torch-pruning, before and after training.

    pip install -r benchmarks/accuracy_requirements.txt
    python benchmarks/macs_trained.py --weights VIT.safetensors --data CIFAR10
    python benchmarks/macs_trained.py --model resnet-narrow --weights R.safetensors --data CIFAR10
    python benchmarks/macs_trained.py --model lite0 --weights LITE0.safetensors --data PHOTOS

The ViT that someone else trained on CIFAR-10, the narrow ResNet of `train_models.py`, and
EfficientNet-Lite0 on photos of ImageNet. `auto --macs` is calibrated on 512 training images (of
Lite0 on every second photo) without labels, effort `fast`; torch-pruning ranks by gradients on as
many, for which it gets their labels, and is asked for the multiply-adds that our model has; its
better form counts (uniform or isomorphic, by the divergence on the calibration images). Then both
get the same training: the loop and the defaults of `finetune`, 60 steps of 64 training images
without labels (of Lite0 32 of the calibration photos, but an eighth), the original as teacher, the
state of the least loss on 512 held-out images (that eighth); the learning rate is found by the
default's test, for torch-pruning also the better of that and of two others, by the held-out loss.
Judged on all test images (the other photos), three seeds. Multiply-adds are those that
`torch.utils.flop_counter` counts while a model runs. Results go to
`benchmarks/results/macs_trained.json`, row by row; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from frontier import MODELS, Images, divergence, judged, outputs
from frontier_trained import data_of
from models import normalised, read_pixels
from narrow import labelled_images, multiply_adds, pruned
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import TensorList
from tiedconv.training import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "macs_trained.json"
ASKED = {"vit-real": (75, 60, 50), "resnet-narrow": (93, 80, 60), "lite0": (90, 80, 70)}
STEPS, RATES = 60, (1e-4, 5e-4)


@dataclass(frozen=True)
class Bench:
    """A model, and the images that every method gets.

    Args:
        name: of `frontier.MODELS`.
        model: the original.
        images: to calibrate by and to judge on, with labels.
        labelled: for torch-pruning.
        learned, held: to train on, and to choose a state by.
        later: images of `held`, to choose a learning rate by.
        batch: images of a step.
    """

    name: str
    model: nn.Module
    images: Images
    labelled: tuple[Tensor, Tensor]
    learned: Dataset[Any]
    held: Dataset[Any]
    later: Tensor
    batch: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Bench:
        """Of a model's name, its weights and its data."""
        model, images = MODELS[args.model](args)
        if args.model == "dinov2":  # features: there are no labels to rank by, nor to train to
            none = TensorDataset(images[0], images[2])
            return cls("dinov2", model.eval(), images, images[::2], none, none, images[0], 0)
        model.load_state_dict(load_file(args.weights))
        labelled = labelled_images(args.model, images, args.data)
        if args.model == "lite0":
            apart = torch.arange(len(images[0])) % 8 == 0
            learned = TensorList(images[0][~apart], images[2][~apart], augment="crop")
            held = TensorList(images[0][apart], images[2][apart])
            return cls("lite0", model.eval(), images, labelled, learned, held, images[0][apart], 32)
        pixels = read_pixels(args.data)
        some = pixels["val"].some(512)
        return cls(
            args.model, model.eval(), images, labelled, data_of(pixels["train"]),
            data_of(some, "none"), normalised(some.images), 64,
        )  # fmt: skip

    def converted(self, method: str, effort: str = "fast", **budget: str) -> nn.Module:
        """By a scheme, calibrated."""
        shown = TensorDataset(self.images[0], torch.zeros(len(self.images[0]), dtype=torch.int64))
        calib = Calibration(shown, len(shown), CalibConfig(effort=effort), "cpu", 0)
        return tiedconv.convert(copy.deepcopy(self.model), method, calib=calib, **budget)

    def pruned(self, limit: int) -> nn.Module:
        """By torch-pruning, with at most so many multiply-adds."""
        return pruned(self.model, self.labelled, self.images[0], limit)

    def trained(
        self, made: nn.Module, steps: int, seed: int, rates: tuple[float | None, ...]
    ) -> tuple[nn.Module, float]:
        """The best of some learning rates by the held-out images, and that rate; None finds one."""
        wanted, found = outputs(self.model, self.later), []
        for lr in rates:
            student = copy.deepcopy(made)
            config = TrainConfig(
                steps=steps, epochs=None, batch_size=self.batch, distill_weight=1.0, lr=lr,
                seed=seed, workers=0, eval_every_epoch=False, augment="crop",
            )  # fmt: skip
            result = train(
                student, self.learned, self.held, config, teacher=self.model, device="cpu"
            )
            apart = divergence(outputs(student.eval(), self.later), wanted)
            found.append((apart, result.lr, student))
        _, lr, student = min(found, key=lambda one: one[0])
        return student, lr


def counted(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one image, a tied model's narrow, and factored where that takes fewer."""
    run = copy.deepcopy(model).requires_grad_(False)
    if tiedconv.runtime.tie.is_tied(run):
        tiedconv.narrow_layers(run, example=images[:1])
        tiedconv.apply_factors(run, cache=True)
    return multiply_adds(run, images)


def parser_of(
    description: str, models: tuple[str, ...] = ("vit-real", "resnet-narrow", "lite0")
) -> argparse.ArgumentParser:  # fmt: skip
    """Arguments that say which model is trained, and on what."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=models, default=models[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    return parser


def main() -> None:
    """Make the rows that are missing."""
    parser = parser_of(__doc__.splitlines()[0])
    parser.add_argument("--asked", nargs="+", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    bench = Bench.of(args)
    images = bench.images
    expected, whole = outputs(bench.model, images[1]), multiply_adds(bench.model, images[0])
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")

    def missing(key: dict[str, Any]) -> bool:
        return not any(key.items() <= row.items() for row in rows)

    for asked in args.asked or ASKED[args.model]:
        ours: nn.Module | None = None
        for method in ("auto", "torch-pruning"):
            key = {"model": args.model, "method": method, "asked": asked}
            wanted = [{"steps": 0}]
            wanted += [{"steps": args.steps, "seed": seed} for seed in range(args.seeds)]
            wanted = [of for of in wanted if missing({**key, **of})]
            if not wanted:
                continue
            ours = ours or bench.converted("auto", macs=f"{asked}%")
            made = ours if method == "auto" else bench.pruned(counted(ours, images[0]))
            share = round(counted(made, images[0]) / whole, 4)
            for of in wanted:
                facts: dict[str, Any] = {**of, "macs": share}
                student = made.eval()
                if of["steps"]:
                    rates = (None,) if method == "auto" else (None, *RATES)
                    student, facts["lr"] = bench.trained(made, of["steps"], of["seed"], rates)
                add({**key, **facts, **judged(student, images, expected)})


if __name__ == "__main__":
    main()
