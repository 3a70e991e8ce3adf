"""The verb `demo`: the main job, offline, on an embedded real data set, in minutes.

scikit-learn's 1,797 handwritten digits are written as images; a small ViT and a small bottleneck
ResNet, of torchvision's own classes, are trained on them; each is converted by what it does to
training images, fine-tuned with the dense model as teacher, and measured, by the same verbs that a
user calls.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiedconv.calibration import CalibConfig
from tiedconv.commands.convert import convert_file
from tiedconv.commands.finetune import finetune
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import ImageList, eval_transform, open_split, train_transform
from tiedconv.errors import MissingExtra, OutputError
from tiedconv.io.safetensors_file import save_tensors
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision
from tiedconv.training import TrainConfig, train

PREPROCESS = Preprocess(32, None, (0.5,) * 3, (0.5,) * 3)
EPOCHS = {"vit": (14, 5), "resnet": (6, 3)}  # of dense training, of fine-tuning
CALIB_IMAGES = 512

OnStage = Callable[[int, int, str], Any]


@dataclass(frozen=True)
class Row:
    """One model of the demo.

    Args:
        name: what it is.
        path: its file.
        parameters: stored.
        ratio: of the dense model's parameters.
        file_bytes: size of the file.
        converted: top-1 right after conversion, without any training, None for a dense model.
        finetuned: top-1 at the end.
    """

    name: str
    path: Path
    parameters: int
    ratio: float
    file_bytes: int
    converted: float | None
    finetuned: float


@dataclass(frozen=True)
class Demo:
    """What the demo made."""

    rows: tuple[Row, ...]
    picture: Path
    test_images: int
    seconds: float


def digits_vit() -> nn.Module:
    """A ViT for 32 px digits: 4 layers of width 64."""
    torchvision = import_torchvision()
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=256,
        num_classes=10,
    )  # fmt: skip
    return model


def digits_resnet() -> nn.Module:
    """A bottleneck ResNet for 32 px digits: the first two stages of a ResNet, half as wide."""
    torchvision = import_torchvision()
    model: nn.Module = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [2, 4, 1, 1], width_per_group=32, num_classes=10
    )
    model.layer3, model.layer4 = nn.Identity(), nn.Identity()
    model.fc = nn.Linear(512, 10)
    return model


digits_vit.preprocess = PREPROCESS  # type: ignore[attr-defined]
digits_resnet.preprocess = PREPROCESS  # type: ignore[attr-defined]

# A ResNet's 1x1 pairs alone can't halve it, so its tied form shares one W in each stage too.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Recipe]]] = {
    "vit": (
        digits_vit,
        "tiedconv.commands.demo:digits_vit",
        {
            "tied": Recipe.of("tied", params="50%"),
            "lors": Recipe.of("lors", params="50%"),
            "auto": Recipe.of("auto", params="25%"),
        },
    ),
    "resnet": (
        digits_resnet,
        "tiedconv.commands.demo:digits_resnet",
        {
            "tied": Recipe.of("tied", groups="all", first="expand", spatial=True),
            "lors": Recipe.of("lors", params="50%"),
            "auto": Recipe.of("auto", params="40%"),
        },
    ),
}


def run_demo(
    output: Path, *, seed: int = 0, quick: bool = False, on_stage: OnStage | None = None
) -> Demo:
    """Train, convert, fine-tune and measure; files are written to `output`.

    Args:
        output: a folder, made if it is not there; its files of a demo before are replaced.
        seed: of everything random.
        quick: a tenth of the training and of the calibration, to see that it runs.
        on_stage: called with (stages done, stages in all, what comes next).

    Raises:
        MissingExtra: scikit-learn or matplotlib is not installed.
        OutputError: the folder can't be written to.
    """
    start = time.perf_counter()
    factor = 0.1 if quick else 1.0
    stages = itertools.count()
    total = 1 + sum(1 + len(recipes) for _, _, recipes in MODELS.values())

    def stage(what: str) -> None:
        if on_stage is not None:
            on_stage(next(stages), total, what)

    _require("sklearn", "the demo's data")
    _require("matplotlib", "the demo's picture")
    stage("writing the digits as images")
    data = output / "digits"
    tests = write_digits(data)
    images = max(32, round(CALIB_IMAGES * factor))
    fit = CalibConfig(seed=seed, steps=10, joint_steps=10) if quick else CalibConfig(seed=seed)
    calib = Calibration(data, images, fit, device="cpu", workers=0)
    rows: list[Row] = []
    for name, (build, spec, recipes) in MODELS.items():
        stage(f"training a dense {name}")
        dense = output / f"{name}-dense.safetensors"
        training, finetuning = (epochs * factor for epochs in EPOCHS[name])
        rows.append(_train_dense(name, build, data, dense, training, seed))
        for scheme, recipe in recipes.items():
            stage(f"{name}: converting with {scheme} by its images, then fine-tuning")
            config = TrainConfig(
                epochs=finetuning, seed=seed, lr=1e-3, workers=0, augment="none"
            )  # fmt: skip
            label = f"{name}-{scheme}"
            rows.append(_compact(label, spec, recipe, data, dense, config, calib))
    picture = output / "demo.png"
    draw(rows, picture)
    return Demo(tuple(rows), picture, tests, time.perf_counter() - start)


def write_digits(folder: Path) -> int:
    """Write the digits as `train/<digit>/*.png` and `test/<digit>/*.png`; returns the test count.

    Every fifth image of a digit is a test image.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    seen = [0] * 10
    tests = 0
    try:
        for image, label in zip(digits.images, digits.target, strict=True):
            part = "test" if seen[label] % 5 == 4 else "train"
            tests += part == "test"
            place = folder / part / str(label)
            place.mkdir(parents=True, exist_ok=True)
            pixels = (image / 16 * 255).astype("uint8")
            # At the models' size, so that reading an image is decoding alone.
            larger = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
            larger.save(place / f"{seen[label]:03}.png")
            seen[label] += 1
    except OSError as error:
        raise OutputError(
            f"{folder} can't be written ({error.strerror})", hint="Choose another folder with -o"
        ) from None
    return tests


def _train_dense(
    name: str, build: Callable[[], nn.Module], data: Path, path: Path, epochs: float, seed: int
) -> Row:
    """A dense model trained on the digits, and its weights in a file."""
    split = open_split(data, seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build()
    config = TrainConfig(
        epochs=epochs, lr=1e-3, seed=seed, workers=0, augment="none", eval_every_epoch=False
    )
    result = train(
        model,
        ImageList(split.train, train_transform(PREPROCESS, config.augment)),
        ImageList(split.val, eval_transform(PREPROCESS)),
        config,
        device="cpu",
    )
    save_tensors({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    parameters = sum(p.numel() for p in model.parameters())
    return Row(f"{name}, dense", path, parameters, 1.0, path.stat().st_size, None, result.top1)


def _compact(
    name: str,
    spec: str,
    recipe: Recipe,
    data: Path,
    dense: Path,
    config: TrainConfig,
    calib: Calibration,
) -> Row:
    """The dense model converted and fine-tuned."""
    raw = dense.with_name(f"{name}-converted.safetensors")
    finetuned = dense.with_name(f"{name}.safetensors")
    done = convert_file(spec, recipe, raw, weights=dense, calib=calib, force=True)
    result = finetune(
        raw, data, finetuned, config, teacher=str(dense), device="cpu", force=True
    )  # fmt: skip
    return Row(
        name.replace("-", ", "),
        finetuned,
        done.plan.stored,
        done.plan.stored / done.plan.original,
        result.size,
        result.result.top1_before,
        result.result.top1,
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture: parameters stored, and accuracy after conversion and after fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
    places = range(len(rows))
    colours = ["#4b5563" if r.converted is None else "#0f766e" for r in rows]
    left.barh(places, [r.parameters / 1e3 for r in rows], color=colours)
    left.set_yticks(places, [r.name for r in rows])
    left.invert_yaxis()
    left.set_xlabel("parameters stored, thousands")
    for i, row in enumerate(rows):
        left.text(row.parameters / 1e3, i, f" {100 * row.ratio:.0f} %", va="center", fontsize=9)
    left.margins(x=0.18)
    for i, row in enumerate(rows):
        end = 100 * row.finetuned
        if row.converted is not None:
            right.plot([100 * row.converted, end], [i, i], color="#d1d5db", zorder=1)
            right.scatter(100 * row.converted, i, marker="o", color="#f59e0b", zorder=2)
        right.scatter(end, i, marker="D", color=colours[i], zorder=2)
        right.text(end + 2, i, f"{end:.1f}", va="center", fontsize=9)
    for marker, colour, label in (
        ("D", "#4b5563", "dense"),
        ("o", "#f59e0b", "converted by images, without labels or training"),
        ("D", "#0f766e", "fine-tuned"),
    ):
        right.scatter([], [], marker=marker, color=colour, label=label)
    right.set_xlabel("top-1 on test digits, %")
    right.set_xlim(0, 112)
    right.set_xticks(range(0, 101, 20))
    right.grid(axis="x", color="#e5e7eb")
    right.set_axisbelow(True)
    figure.legend(loc="outside lower right", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def _require(module: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        package = {"sklearn": "scikit-learn"}.get(module, module)
        raise MissingExtra.of(package, "demo", purpose)
