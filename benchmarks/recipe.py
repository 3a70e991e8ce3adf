"""What each part of the fine-tuning recipe adds: teacher, averages, augmentation, rates by layer.

    python benchmarks/recipe.py --data .data/cifar10 --vit .data/vit_cifar10.safetensors

A ViT that was trained on CIFAR-10 is tied to half of its parameters and fine-tuned by
`tiedconv.training.train`. Each row changes one part of the base recipe. Its learning rate is
chosen by a short training measured on held-out training images; then it is trained with each seed
and measured on those and on the test images. The last row, `best`, joins the parts that raised
the held-out mean over that of the base. Nothing is chosen by the test images. The held-out images
are not used for fine-tuning, but the ViT was trained on them by its authors: they are good for
choices between recipes, while their level says nothing.

The result goes to `benchmarks/results/recipe.json` after each run, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accuracy import load
from models import Pixels, listed, read_pixels
from torch import nn

import tiedconv
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.training import TrainConfig, evaluate_model, train

RESULT = Path(__file__).parent / "results" / "recipe.json"
RATES = (3e-5, 1e-4, 3e-4, 5e-4, 1e-3, 3e-3)

Options = Mapping[str, Any]

BASE: Options = {"augment": "crop", "distill_weight": 0.9}
"""Images shifted and mirrored; soft distillation with the library's defaults, but for the teacher's
share: that was 0.9 until this benchmark said 0.5 (the row `half`)."""

# Part of the recipe, then its other settings: options of the training, and `teacher`.
PARTS: Mapping[str, Mapping[str, Options]] = {
    "rate": {f"{rate:g}": {"lr": rate} for rate in RATES},
    "distillation": {
        "none": {"teacher": False},
        "hard": {"distillation": "hard"},
        "half": {"distill_weight": 0.5},
        "all": {"distill_weight": 1.0},
        "temperature 1": {"temperature": 1.0},
        "temperature 4": {"temperature": 4.0},
    },
    "features": {
        "0.1": {"features": 0.1},
        "1": {"features": 1.0},
        "1, no logits": {"features": 1.0, "distill_weight": 0.0},
    },
    "labels": {"smoothing 0.1": {"label_smoothing": 0.1}},
    "average": {
        "0.99": {"ema": 0.99},
        "0.999": {"ema": 0.999},
    },
    "augmentation": {
        "none": {"augment": "none"},
        "flip": {"augment": "flip"},
        "erasing": {"erasing": 0.25},
        "mixup 0.2": {"mixup": 0.2},
        "mixup 0.8": {"mixup": 0.8},
        "cutmix 1": {"cutmix": 1.0},
        "mixup 0.8, cutmix 1": {"mixup": 0.8, "cutmix": 1.0},
    },
    "layer decay": {
        "0.9": {"layer_decay": 0.9},
        "0.75": {"layer_decay": 0.75},
        "0.5": {"layer_decay": 0.5},
    },
    "progressive": {f"{share:g}": {"progressive": share} for share in (0.25, 0.5, 1.0)},
    "weight decay": {"0": {"weight_decay": 0.0}, "0.2": {"weight_decay": 0.2}},
}


def rows() -> dict[str, Options]:
    """Name of a row to what it changes of the base."""
    single = {f"{p}: {n}": o for p, settings in PARTS.items() for n, o in settings.items()}
    return {"base": {}, **single}


class Bench:
    """The runs, and the file they go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.store: dict[str, Any] = {}
        if args.result.is_file():
            self.store = json.loads(args.result.read_text())
        pixels = read_pixels(args.data)
        self.train = pixels["train"]
        self.held_out = listed(pixels["val"].some(args.held_out_images))
        self.test = listed(pixels["test"].some(args.limit))
        self.dense = load(args).eval()
        self._check_setting()
        self.start = self._converted(self.train.some(args.calib_images))
        if "before" not in self.store:
            self.store["before"] = {
                "dense": self._measured(self.dense), "compact": self._measured(self.start),
                "parameters": sum(p.numel() for p in self.start.parameters()),
                "parameters_dense": sum(p.numel() for p in self.dense.parameters()),
            }  # fmt: skip
            self.write()

    def _check_setting(self) -> None:
        args = self.args
        setting = {
            "model": args.model, "scheme": args.scheme, "params": args.params,
            "calib_images": args.calib_images,
            "steps": args.steps, "select_steps": args.select_steps, "rates": list(args.rates),
            "held_out_images": len(self.held_out), "test_images": len(self.test),
            "train_images": len(self.train), "batch": args.batch, "base": dict(BASE),
            "borders": "reflected",  # what a shift moves in; it was black before
        }  # fmt: skip
        known = self.store.setdefault("setting", setting)
        if {k: known.get(k) for k in setting} != setting:
            raise SystemExit(f"{args.result} has another setting: {known}. Name another file.")
        cuda = args.device != "cpu" and torch.cuda.is_available()
        known["torch"] = str(torch.__version__)
        known["device"] = torch.cuda.get_device_name() if cuda else platform.machine()

    def _converted(self, calib: Pixels) -> nn.Module:
        """The compact model that every run begins with; the same each time."""
        calibration = listed(calib) if self.args.calib_images else None
        return tiedconv.convert(
            self.dense, self.args.scheme, params=self.args.params, calib=calibration
        )  # fmt: skip

    def _measured(self, model: nn.Module) -> dict[str, float]:
        parts = {"held_out": self.held_out, "top1": self.test}
        return {
            name: evaluate_model(model, data, batch_size=500, device=self.args.device).top1
            for name, data in parts.items()
        }

    def write(self) -> None:
        """The file, whole or not at all."""
        self.args.result.parent.mkdir(parents=True, exist_ok=True)
        part = self.args.result.with_suffix(".part")
        part.write_text(json.dumps(self.store, indent=1) + "\n")
        part.replace(self.args.result)

    def trained(self, options: Options, steps: int, lr: float, seed: int) -> nn.Module:
        """A copy of the compact model, fine-tuned by the base recipe with these changes."""
        changed = {"lr": lr, "batch_size": self.args.batch, **BASE, **options}
        teacher = self.dense if changed.pop("teacher", True) else None
        config = TrainConfig(
            epochs=None, steps=steps, seed=seed, eval_every_epoch=False, **changed
        )  # fmt: skip
        shown = listed(self.train, augment=config.augment, erasing=config.erasing)
        model = copy.deepcopy(self.start)
        # What it evaluates before and after is not asked for: a few images will do.
        few = listed(self.train.take(torch.arange(8)))
        blend = OriginalBlend(model, self.dense) if config.progressive else None
        train(
            model, shown, few, config, teacher=teacher, blend=blend, device=self.args.device
        )  # fmt: skip
        return model

    def choose(self, name: str, options: Options) -> float:
        """The learning rate that is best for a row on held-out images, if it does not set one."""
        if "lr" in options:
            return float(options["lr"])
        known = self.store.setdefault("select", {}).setdefault(name, {})
        for lr in self.args.rates:
            if f"{lr:g}" not in known:
                model = self.trained(options, self.args.select_steps, lr, 0)
                known[f"{lr:g}"] = evaluate_model(
                    model, self.held_out, batch_size=500, device=self.args.device
                ).top1
                self.write()
        best = max(known, key=known.__getitem__)
        print(f"{name}: {known}, chosen {best}", flush=True)
        return float(best)

    def row(self, name: str, options: Options) -> None:
        """Chooses a row's rate and trains it with each seed, where that isn't done."""
        runs = self.store.setdefault("runs", {})
        todo = [seed for seed in self.args.seeds if f"{name}/{seed}" not in runs]
        lr = self.choose(name, options) if todo else 0.0
        for seed in todo:
            start = time.perf_counter()
            model = self.trained(options, self.args.steps, lr, seed)
            seconds = round(time.perf_counter() - start, 1)
            runs[f"{name}/{seed}"] = {
                **self._measured(model), "lr": lr, "options": dict(options), "seconds": seconds
            }  # fmt: skip
            self.write()
            print(f"{name}/{seed}", runs[f"{name}/{seed}"], flush=True)

    def mean(self, name: str, figure: str) -> float:
        """A figure's mean over the seeds."""
        return statistics.fmean(
            self.store["runs"][f"{name}/{seed}"][figure] for seed in self.args.seeds
        )

    def best(self) -> Options:
        """The options of all parts whose best setting raised the held-out mean."""
        joined: dict[str, Any] = {}
        for part, settings in PARTS.items():
            if part == "rate":
                continue  # chosen for each row anyway
            name = max(settings, key=lambda s: self.mean(f"{part}: {s}", "held_out"))
            if self.mean(f"{part}: {name}", "held_out") > self.mean("base", "held_out"):
                joined |= settings[name]
        if not joined.get("teacher", True):  # without one, there is nothing of it to learn
            for option in ("distillation", "features", "distill_weight"):
                joined.pop(option, None)
        return joined

    def table(self) -> str:
        """The means, as text."""
        names = dict.fromkeys(key.rpartition("/")[0] for key in self.store["runs"])
        done = [n for n in names if all(f"{n}/{s}" in self.store["runs"] for s in self.args.seeds)]
        lines = [f"{'':36}{'lr':>8}{'held out':>10}{'test':>8}{'+-':>7}"]
        for name in done:
            runs = [self.store["runs"][f"{name}/{seed}"] for seed in self.args.seeds]
            test = [100 * run["top1"] for run in runs]
            spread = statistics.stdev(test) if len(test) > 1 else 0.0
            held_out = 100 * self.mean(name, "held_out")
            lines.append(
                f"{name:36}{runs[0]['lr']:>8g}{held_out:>10.2f}{statistics.fmean(test):>8.2f}"
                f"{spread:>7.2f}"
            )
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--models", type=Path, default=Path(".data/models"))
    parser.add_argument("--vit", type=Path, default=Path(".data/vit_cifar10.safetensors"))
    parser.add_argument("--model", default="vit-real")
    parser.add_argument("--scheme", default="tied")
    parser.add_argument("--params", default="50%")
    parser.add_argument("--calib-images", type=int, default=1024, help="0 converts without data")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--select-steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES[:3]))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out-images", type=int, default=5000)
    parser.add_argument("--limit", type=int, help="test images, for a trial")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="beginnings of names of rows")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    bench = Bench(args)
    print(bench.store["before"], flush=True)
    for name, options in rows().items():
        if not args.only or name.startswith(tuple(args.only)):
            bench.row(name, options)
    if not args.only:
        bench.row("best", bench.best())
    print(bench.table())


if __name__ == "__main__":
    main()
