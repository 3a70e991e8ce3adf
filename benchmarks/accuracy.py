"""Accuracy at equal size: tiedconv's schemes and their baselines, with one training for all.

    python benchmarks/accuracy.py --data .data/cifar10 --models .data/models \\
        --vit .data/vit_cifar10.safetensors --model vit-real --budgets 50 30 20 10 --seeds 0 1 2
    python benchmarks/accuracy.py --merge A.json B.json --result benchmarks/results/accuracy.json

Each method makes a model of at most the budget (in parameters of the whole model), which is
measured on the test images as converted without data, as calibrated on 1,024 training images, and
after `--steps` of training. A method's learning rate, and its variant if it has any, are chosen
for each budget by short trainings measured on held-out images: what has lost more has farther to
go. The seed decides
the order and the augmentation of the images, and random weights where there are any.

The result is written after each run, so a stopped run goes on; runs at another rate than the one
chosen are made again. `pareto.py` draws it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import baselines
import torch
import train_models
from baselines import Context
from finetuning import Teacher, finetune, flops, recalibrate, stored_bytes, stored_parameters
from models import SIZES, listed, read_pixels, top1
from safetensors.torch import load_file
from torch import nn

import tiedconv
from tiedconv.errors import BudgetError, SchemeError
from tiedconv.schemes import all_schemes

RATES = (3e-4, 1e-3, 3e-3)
HIGHEST = 1e-2
"""Tried too where the last of the rates is the best of them."""

CALIB_IMAGES = 1024
BUDGETS = (50.0, 30.0, 20.0, 10.0)
RESULT = Path(__file__).parent / "results" / "accuracy.json"


@dataclass(frozen=True)
class Compact:
    """A small model, before its training.

    Args:
        model: to be trained.
        stage: `converted` without data, `calibrated` by images, or `scratch`, of random weights.
        datafree: of a calibrated model, the same converted without data, where that exists.
        options: of the scheme, where it was one.
    """

    model: nn.Module
    stage: str = "converted"
    datafree: nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to a small model.

    Args:
        make: from context, budget in percent, variant and seed to the small model.
        variants: ways of it; the best on held-out images counts.
        seeded: whether the seed changes what is made.
        dense: makes nothing smaller, so the budgets do not matter.
        whole: trained on labels as the dense model was, from its random weights and for
            `--scratch-steps`, many more than the others get.
        finetune: arguments of `finetune`, by variant.
    """

    make: Callable[[Context, float, str, int], Compact]
    variants: tuple[str, ...] = ("",)
    seeded: bool = False
    dense: bool = False
    whole: bool = False
    finetune: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def convert(
    ctx: Context, budget: float, scheme: str, *, data: bool = True, model: nn.Module | None = None,
    **fixed: Any,
) -> Compact:  # fmt: skip
    """Ours: the mildest of a scheme's options that meet the budget, calibrated if that exists."""
    model = model or ctx.dense
    options = {**_options(ctx, budget, scheme, model, fixed), "params": f"{budget}%"}
    plain = tiedconv.convert(model, scheme, **options)
    if not data:
        return Compact(plain, options=options)
    fitted = tiedconv.convert(model, scheme, calib=listed(ctx.calib), **options)
    return Compact(fitted, "calibrated", plain, options)


def _options(
    ctx: Context, budget: float, scheme: str, model: nn.Module, fixed: Mapping[str, Any]
) -> dict[str, Any]:
    if scheme not in all_schemes():
        raise SchemeError(f"There is no scheme {scheme!r} yet")
    ways: list[Mapping[str, Any]] = [{}]
    if scheme == "tied":
        ways += [{"groups": "adjacent:2"}, {"groups": "adjacent:4"}]
    ways += all_schemes()[scheme].smaller_options
    for way in ways:
        try:
            tiedconv.plan(model, scheme, params=f"{budget}%", **{**way, **fixed})
        except BudgetError as error:
            refused = error
        else:
            return {**way, **fixed}
    raise refused


def _half_width(ctx: Context, budget: float, _: str, seed: int) -> Compact:
    """A narrower model of the same class, random weights."""
    return Compact(baselines.half_width(ctx, budget, seed), "scratch")


def _tied_scratch(ctx: Context, budget: float, _: str, seed: int) -> Compact:
    """The paper's own way: tied from the start, no scales, random weights."""
    made = convert(ctx, budget, "tied", data=False, model=ctx.random(None, seed), scale=False)
    return Compact(made.model, "scratch", options=made.options)


OURS = ("tied", "lors", "basis", "auto", "lowrank")
METHODS: dict[str, Method] = {
    **{n: Method(lambda c, b, v, s, n=n: convert(c, b, n)) for n in OURS},
    **{f"{n}-datafree": Method(lambda c, b, v, s, n=n: convert(c, b, n, data=False)) for n in OURS},
    "svd": Method(lambda c, b, v, s: Compact(baselines.svd(c, b))),
    "whitened-svd": Method(lambda c, b, v, s: Compact(baselines.whitened_svd(c, b), "calibrated")),
    "torch-pruning": Method(
        lambda c, b, v, s: Compact(baselines.torch_pruning(c, b, v), "calibrated"),
        ("uniform", "isomorphic"),
    ),
    "minivit": Method(
        lambda c, b, v, s: Compact(baselines.minivit(c, b, v)),
        ("mean", "first"),
        finetune={"mean": {"hidden": 0.1}, "first": {"hidden": 0.1}},
    ),
    "half-width": Method(_half_width, seeded=True),
    "tied-scratch": Method(_tied_scratch, seeded=True),
    "half-width-whole": Method(_half_width, seeded=True, whole=True),
    "tied-scratch-whole": Method(_tied_scratch, seeded=True, whole=True),
    "dense-more": Method(
        lambda c, b, v, s: Compact(copy.deepcopy(c.dense)),
        ("teacher", "no-teacher"),
        dense=True,
        finetune={"no-teacher": {"distill": 0.0}},
    ),
}  # fmt: skip


class Bench:
    """One model's runs, and the file they go to."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name = args.name or args.model
        self.store: dict[str, Any] = {}
        if args.result.is_file():
            self.store = json.loads(args.result.read_text())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        pixels = {k: v.to(device) for k, v in read_pixels(args.data).items()}
        self.test = pixels.pop("test").some(args.limit)
        dense = load(args).to(device).eval()
        calib = pixels["train"].some(args.calib_images)
        self.held_out = pixels["val"].some(args.select_images)
        self.ctx = Context(args.model, dense, Teacher(dense), pixels, calib)
        self.prepared = functools.lru_cache(1)(self._prepared)
        self._check_setting(device)
        if self.name not in self.store.setdefault("dense", {}):
            self.store["dense"][self.name] = {
                **_size(dense), "top1": top1(dense, self.test),
                "held_out": top1(dense, self.held_out),
            }  # fmt: skip
            self.write()

    def _check_setting(self, device: str) -> None:
        setting = {
            "steps": self.args.steps, "select_steps": self.args.select_steps, "batch": 256,
            "rates": list(RATES), "temperature": 2.0, "distill": 0.9,
            "calib_images": self.args.calib_images, "select_images": self.args.select_images,
            "test_images": len(self.test), "augmentation": "crop, flip",
        }  # fmt: skip
        known = self.store.setdefault("settings", {}).setdefault(self.name, setting)
        if {k: known.get(k) for k in setting} != setting:
            raise SystemExit(f"{self.args.result} has other settings: {known}. Name another file.")
        known["torch"] = str(torch.__version__)
        known["device"] = torch.cuda.get_device_name() if device == "cuda" else platform.machine()

    def write(self) -> None:
        """The file, whole or not at all."""
        self.args.result.parent.mkdir(parents=True, exist_ok=True)
        part = self.args.result.with_suffix(".part")
        part.write_text(json.dumps(self.store, indent=1) + "\n")
        part.replace(self.args.result)

    def _prepared(self, name: str, budget: float, variant: str, seed: int) -> dict[str, Any]:
        """A small model and what it scores before its training."""
        start = time.perf_counter()
        made = METHODS[name].make(self.ctx, budget, variant, seed)
        seconds = time.perf_counter() - start
        return {"made": made, "seconds": seconds}

    def untrained(self, made: Compact) -> dict[str, float | None]:
        """Top-1 as converted and as calibrated; a batch norm's statistics are a calibration."""
        plain = made.model if made.stage == "converted" else made.datafree
        converted = None if plain is None else top1(plain, self.test)
        fitted = copy.deepcopy(made.model)
        # What was fitted to these statistics has them; the others' are of the weights of before.
        ours = made.stage == "calibrated" and made.datafree is not None
        renewed = not ours and recalibrate(fitted, self.ctx.pixels["train"])
        calibrated = None
        if made.stage == "calibrated" or (made.stage == "converted" and renewed):
            calibrated = top1(fitted, self.test)
        return {"top1_converted": converted, "top1_calibrated": calibrated}

    def trained(
        self, name: str, model: nn.Module, variant: str, steps: int, lr: float, seed: int
    ) -> nn.Module:
        """A copy of the model, trained."""
        model = copy.deepcopy(model)
        if METHODS[name].whole:
            train_models.train(model, self.ctx.pixels["train"], self._whole(seed), lr)
            return model
        more = METHODS[name].finetune.get(variant, {})
        finetune(model, self.ctx.teacher, self.ctx.pixels["train"], steps, lr, seed, **more)
        recalibrate(model, self.ctx.pixels["train"])
        return model

    def _whole(self, seed: int) -> argparse.Namespace:
        """The options of `train_models.py` that made the dense model."""
        return argparse.Namespace(
            model=self.args.model, steps=self.args.scratch_steps, batch_size=256, seed=seed,
            strong=False, drop_patches=0.0,
        )  # fmt: skip

    def choose(self, name: str, budget: float) -> dict[str, Any]:
        """Learning rate and variant at a budget; raises BudgetError where it can't be met."""
        if METHODS[name].whole:
            if self.args.model not in train_models.RATES:
                raise SchemeError(f"how {self.args.model} was trained is not known")
            return {"variant": "", "lr": train_models.RATES[self.args.model]}
        known = self.store.setdefault("select", {})
        key = f"{self.name}/{name}/{budget:g}"
        scores = dict(known.get(key, {}).get("held_out", {}))
        for variant in METHODS[name].variants:
            for lr in (*RATES, HIGHEST):
                not_needed = lr == HIGHEST and _best(scores, variant) != RATES[-1]
                if not_needed or f"{variant}@{lr}" in scores:
                    continue
                made = self.prepared(name, budget, variant, 0)["made"]
                model = self.trained(name, made.model, variant, self.args.select_steps, lr, 0)
                scores[f"{variant}@{lr}"] = top1(model, self.held_out)
        if scores != known.get(key, {}).get("held_out"):
            variant, _, lr = max(scores, key=scores.__getitem__).partition("@")
            known[key] = {"held_out": scores, "variant": variant, "lr": float(lr)}
            self.write()
            print(key, known[key], flush=True)
        return dict(known[key])

    def run(self, name: str, budget: float, seed: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """One small model, made, trained and measured."""
        found = self.prepared(
            name, budget, chosen["variant"], seed if METHODS[name].seeded else 0
        )  # fmt: skip
        made: Compact = found["made"]
        if "before" not in found:
            found["before"] = {
                **_size(made.model), "options": dict(made.options), **self.untrained(made)
            }  # fmt: skip
        start = time.perf_counter()
        steps = self.args.scratch_steps if METHODS[name].whole else self.args.steps
        model = self.trained(name, made.model, chosen["variant"], steps, chosen["lr"], seed)
        return {
            "variant": chosen["variant"], "lr": chosen["lr"], "steps": steps, **found["before"],
            "top1_finetuned": top1(model, self.test),
            "held_out": top1(model, self.held_out),
            "seconds_made": round(found["seconds"], 1),
            "seconds_trained": round(time.perf_counter() - start, 1),
        }  # fmt: skip

    def method(self, name: str) -> None:
        """All runs of a method that are not in the file yet."""
        budgets = [100.0] if METHODS[name].dense else self.args.budgets
        runs = self.store.setdefault("runs", {})
        keys = {f"{self.name}/{name}/{b:g}/{s}": (b, s) for b in budgets for s in self.args.seeds}
        for key, (budget, seed) in keys.items():
            if "infeasible" in runs.get(key, {}):
                continue
            try:
                chosen = self.choose(name, budget)
                if key in runs and all(runs[key][k] == chosen[k] for k in ("variant", "lr")):
                    continue
                runs[key] = self.run(name, budget, seed, chosen)
            except BudgetError as error:
                runs[key] = {"infeasible": str(error)}
            self.write()
            print(key, runs[key], flush=True)


def _best(scores: Mapping[str, float], variant: str) -> float:
    """The best learning rate of a variant so far."""
    rates = {lr: scores[f"{variant}@{lr}"] for lr in RATES}
    return max(rates, key=rates.__getitem__)


def _size(model: nn.Module) -> dict[str, int]:
    return {
        "parameters": stored_parameters(model), "bytes": stored_bytes(model), "flops": flops(model)
    }  # fmt: skip


def load(args: argparse.Namespace) -> nn.Module:
    """The pretrained model."""
    file = args.vit if args.model == "vit-real" else args.models / f"{args.model}.safetensors"
    weights = load_file(file)
    classes = next(len(weights[n]) for n in ("head.weight", "fc.weight") if n in weights)
    if args.model == "vit-real":
        model = baselines.WIDTHS["vit-real"][0](128, classes)
    else:
        model = SIZES[args.model](classes)
    model.load_state_dict(weights)
    return model


def merge(files: list[Path], result: Path) -> None:
    """Join results; where two files have the same run, the later one counts."""
    store = json.loads(result.read_text()) if result.is_file() else {}
    for file in files:
        for part, entries in json.loads(file.read_text()).items():
            for key, entry in entries.items():
                known = store.setdefault(part, {}).get(key)
                if part == "settings" and known and known["steps"] != entry["steps"]:
                    raise SystemExit(f"{file}: {key} was trained for another number of steps")
                store[part][key] = entry
    result.write_text(json.dumps(store, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path(".data/cifar10"))
    parser.add_argument("--models", type=Path, default=Path(".data/models"))
    parser.add_argument("--vit", type=Path, default=Path(".data/vit_cifar10.safetensors"))
    parser.add_argument("--model", choices=[*baselines.WIDTHS], default="vit-real")
    parser.add_argument("--name", help="what results are called, if not as the model")
    parser.add_argument("--budgets", type=float, nargs="+", default=[*BUDGETS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--scratch-steps", type=int, default=2500, help="of the dense training")
    parser.add_argument("--select-steps", type=int, default=30)
    parser.add_argument("--select-images", type=int, default=2000)
    parser.add_argument("--calib-images", type=int, default=CALIB_IMAGES)
    parser.add_argument("--limit", type=int, help="test images, for a trial")
    usual = [name for name in METHODS if not name.endswith(("-datafree", "-whole"))]
    parser.add_argument("--only", nargs="+", choices=[*METHODS], metavar="NAME", default=usual)
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.merge:
        return merge(args.merge, args.result)
    print(f"tiedconv {tiedconv.__version__}, torch {torch.__version__} ")
    bench = Bench(args)
    for name in args.only:
        try:
            bench.method(name)
        except SchemeError as error:
            print(f"{name} is left out: {error}", flush=True)
    return None


if __name__ == "__main__":
    main()
