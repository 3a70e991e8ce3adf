"""Accuracy on real input: a ViT that someone else trained on CIFAR-10, at half its parameters.

    python benchmarks/vit_cifar10.py --data CIFAR10 --weights VIT.safetensors

`CIFAR10` holds `train/<class>/*.jpg` (50,000) and `test/<class>/*.jpg` (10,000); the weights are
in timm's names (depth 4, width 128, patch 4, 546,186 parameters). Each compact model is made and
healed by the commands that a user types, for the same number of steps; the dense model gets the
same training, with and without itself as teacher. The learning rate is chosen on a tenth held out
of the training images, never on the test images: once for the compact models, once for each dense.

Results go to `benchmarks/results/vit_cifar10.json` after each run, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import tiedconv
from tiedconv.data import ImageList, eval_transform, find_split, train_transform
from tiedconv.sources import Preprocess, load_into, open_source, read_weights
from tiedconv.training import TrainConfig, train

ARGS = {
    "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2,
    "num_classes": 10,
}  # fmt: skip
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PREPROCESS = Preprocess(32, None, MEAN, STD)
SPEC = "timm:vit_tiny_patch16_224"
SCHEMES = {
    "tied": ["--scheme", "tied"],
    "tied-50": ["--scheme", "tied", "--option", "groups=adjacent:2", "--params", "50%"],
    "lors-50": ["--scheme", "lors", "--params", "50%"],
    "lowrank-50": ["--scheme", "lowrank", "--params", "50%"],
}
DENSE = {"dense": "none", "dense, own teacher": "self"}
# The compact models share one choice of the learning rate.
CHOSEN_BY = dict.fromkeys(["tied-50", "lors-50", "lowrank-50"], "tied")
RATES = (3e-4, 1e-3, 3e-3)
RESULT = Path(__file__).parent / "results" / "vit_cifar10.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--select-steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*SCHEMES, *DENSE])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    store = json.loads(args.result.read_text()) if args.result.is_file() else {}
    store["setting"] = {
        "steps": args.steps, "batch_size": 256, "augment": "crop", "temperature": 2.0,
        "distill": 0.9, "select_steps": args.select_steps, "rates": RATES,
        "torch": str(torch.__version__), "machine": platform.machine(),
    }  # fmt: skip
    runs = store.setdefault("runs", {})

    def once(key: str, work: Any) -> Any:
        if key not in runs:
            runs[key] = work()
            args.result.parent.mkdir(exist_ok=True)
            args.result.write_text(json.dumps(store, indent=1) + "\n")
            print(key, runs[key], flush=True)
        return runs[key]

    for name in sorted({CHOSEN_BY.get(name, name) for name in args.only}):
        for lr in RATES:
            once(
                f"select/{name}/{lr}",
                lambda name=name, lr=lr: run(
                    name, args, args.data / "train", args.select_steps, lr, 0
                ),
            )
    for seed in range(args.seeds):
        for name in args.only:
            best = max(
                RATES,
                key=lambda lr, name=name: runs[f"select/{CHOSEN_BY.get(name, name)}/{lr}"]["top1"],
            )
            once(
                f"final/{name}/{seed}",
                lambda name=name, best=best, seed=seed: run(
                    name, args, args.data, args.steps, best, seed
                ),
            )


def run(
    name: str, args: argparse.Namespace, data: Path, steps: int, lr: float, seed: int
) -> dict[str, Any]:
    """One training; figures before and after on the images that `data` is evaluated on."""
    work = run_dense if name in DENSE else run_compact
    return {"lr": lr, "steps": steps, **work(name, args, data, steps, lr, seed)}


def run_compact(
    name: str, args: argparse.Namespace, data: Path, steps: int, lr: float, seed: int
) -> dict[str, Any]:
    """Convert and fine-tune by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        compact, healed = Path(folder) / "c.safetensors", Path(folder) / "h.safetensors"
        model_args = [part for k, v in ARGS.items() for part in ("--model-arg", f"{k}={v}")]
        images = ["--image-size", "32", "--resize", "0", "--mean", ",".join(map(str, MEAN))]
        images += ["--std", ",".join(map(str, STD))]
        made = command(
            "convert", SPEC, *model_args, "--weights", args.weights, *images, *SCHEMES[name],
            "-o", compact,
        )  # fmt: skip
        done = command(
            "finetune", compact, "--data", data, "-o", healed, "--teacher", args.weights,
            "--steps", steps, "--batch-size", 256, "--lr", lr, "--seed", seed,
        )["result"]  # fmt: skip
        return {
            "parameters": made["stored"], "bytes": made["file_bytes"],
            "before": done["top1_before"], "top1": done["top1"], "seconds": done["seconds"],
        }  # fmt: skip


def command(*words: object) -> Any:
    """The JSON that a tiedconv command prints."""
    line = [sys.executable, "-m", "tiedconv", *map(str, words), "--json"]
    return json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


def run_dense(
    name: str, args: argparse.Namespace, data: Path, steps: int, lr: float, seed: int
) -> dict[str, Any]:
    """The dense model, trained on by the same engine."""
    model, _ = open_source(SPEC, ARGS, args.weights)
    teacher = None
    if DENSE[name] == "self":
        teacher, _ = open_source(SPEC, ARGS, "none")
        load_into(teacher, read_weights(args.weights))
    split = find_split(data, seed=seed)
    config = TrainConfig(epochs=None, steps=steps, batch_size=256, lr=lr, seed=seed)
    result = train(
        model,
        ImageList(split.train, train_transform(PREPROCESS, config.augment)),
        ImageList(split.val, eval_transform(PREPROCESS)),
        config,
        teacher=teacher,
    )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": args.weights.stat().st_size,
        "before": result.top1_before, "top1": result.top1, "seconds": result.seconds,
    }  # fmt: skip


if __name__ == "__main__":
    print(f"tiedconv {tiedconv.__version__}, torch {torch.__version__}")
    main()
