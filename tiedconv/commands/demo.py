"""The verb `demo`: the whole workflow, offline, on a real data set, in about two minutes.

scikit-learn's 1,797 handwritten digits are written as images; a small ViT and a small bottleneck
ResNet, of torchvision's own classes, are trained on them. Each is converted, calibrated on training
images without their labels, fine-tuned with the dense model as teacher, and evaluated on test
images, by the same functions that a user calls.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tiedconv.calibration import CalibConfig
from tiedconv.commands.convert_file import convert_file
from tiedconv.commands.finetune import finetune
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import ImageList, eval_transform, open_split, train_transform
from tiedconv.errors import MissingExtra, OutputError
from tiedconv.io.safetensors_file import save_tensors
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision
from tiedconv.training import Event, Start, Step, TrainConfig, train

PREPROCESS = Preprocess(32, None, (0.5,) * 3, (0.5,) * 3)
EPOCHS = {"vit": (14, 3), "resnet": (4, 1)}  # of dense training, of fine-tuning
CALIB_IMAGES = 256
# About the processor seconds of each stage, so that the time left can be estimated.
SECONDS = {"vit": (33.0, 17.0), "resnet": (24.0, 25.0)}

OnStage = Callable[[float, float, str], Any]


@dataclass(frozen=True)
class Row:
    """One model of the demo.

    Args:
        name: what it is.
        path: its file.
        parameters: stored.
        ratio: of the dense model's parameters.
        file_bytes: size of the file.
        converted: top-1 after conversion and before fine-tuning, None for a dense model.
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
    """What the demo made.

    Args:
        rows: the dense models, each followed by its compact forms.
        picture: the file drawn.
        test_images: that accuracies were measured on.
        seconds: by the clock.
        stages: what was done, and the processor seconds it took.
    """

    rows: tuple[Row, ...]
    picture: Path
    test_images: int
    seconds: float
    stages: tuple[tuple[str, float], ...] = ()

    @property
    def title(self) -> str:
        """The result in one sentence."""
        return result_of(self.rows)


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
    """Train, convert, fine-tune and evaluate; files are written to `output`.

    Args:
        output: a folder, made if it is not there; its files of a demo before are replaced.
        seed: of everything random.
        quick: a tenth of the training and of the calibration, to see that it runs.
        on_stage: called with (work done, work in all, the current stage), in processor seconds.

    Raises:
        MissingExtra: scikit-learn or matplotlib is not installed.
        OutputError: the folder can't be written to.
    """
    factor = 0.1 if quick else 1.0
    stages = Stages(on_stage)
    _require("sklearn", "the demo's data")
    _require("matplotlib", "the demo's picture")
    stages.begin("writing the digits as images", 1.0)
    data = output / "digits"
    tests = write_digits(data)
    calib = Calibration(
        data,
        max(32, round(CALIB_IMAGES * factor)),
        # A mirrored digit is no digit, and 20 steps are five epochs: too few to overfit.
        CalibConfig(effort="fast", joint_steps=20, augment=False, seed=seed),
        device="cpu",
        workers=0,
    )
    rows: list[Row] = []
    for name, (build, spec, recipes) in MODELS.items():
        (training, fine_tuning), (train_work, compact_work) = EPOCHS[name], SECONDS[name]
        stages.begin(f"{name}: training the dense model", train_work)
        dense = output / f"{name}-dense.safetensors"
        rows.append(_train_dense(name, build, data, dense, training * factor, seed, stages))
        for scheme, recipe in recipes.items():
            stages.begin(f"{name}: converting with {scheme}, then fine-tuning", compact_work)
            config = TrainConfig(
                epochs=fine_tuning * factor, seed=seed, lr=1e-3, workers=0, augment="none"
            )
            label = f"{name}-{scheme}"
            rows.append(_compact(label, spec, recipe, data, dense, config, calib, stages))
    picture = output / "demo.png"
    stages.begin("drawing the picture", 1.0)
    draw(rows, picture)
    stages.end()
    return Demo(tuple(rows), picture, tests, stages.total, tuple(stages.seconds.items()))


class Stages:
    """What is done and what remains, and the processor seconds of each stage.

    Args:
        on_stage: called as in `run_demo`.
    """

    work = 2.0 + sum(SECONDS[n][0] + SECONDS[n][1] * len(MODELS[n][2]) for n in SECONDS)

    def __init__(self, on_stage: OnStage | None) -> None:
        self._on_stage = on_stage
        self._start, self._last = time.perf_counter(), time.process_time()
        self._done = self._weight = 0.0
        self._what = ""
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds since the start, by the clock."""
        return time.perf_counter() - self._start

    def begin(self, what: str, weight: float) -> None:
        """A stage of about `weight` seconds begins, and the one before it ends."""
        self.end()
        self._what, self._weight = what, weight
        self._report(0.0)

    def end(self) -> None:
        """The current stage ends."""
        now = time.process_time()
        if self._what:
            self.seconds[self._what] = now - self._last
        self._done, self._weight, self._last = self._done + self._weight, 0.0, now
        self._report(0.0)

    def __call__(self, event: Event) -> None:
        """A training step is done."""
        if isinstance(event, Start):
            self._steps = event.steps
        elif isinstance(event, Step):
            self._report(event.step / self._steps)

    def _report(self, fraction: float) -> None:
        if self._on_stage is not None and self._what:
            self._on_stage(self._done + fraction * self._weight, self.work, self._what)


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
            f"{folder} can't be written ({error.strerror})",
            hint="Choose another folder with -o",
            code="folder-not-writable",
        ) from None
    return tests


def _train_dense(
    name: str, build: Callable[[], nn.Module], data: Path, path: Path, epochs: float, seed: int,
    stages: Stages,
) -> Row:  # fmt: skip
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
        on_event=stages,
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
    stages: Stages,
) -> Row:
    """The dense model converted and fine-tuned."""
    raw = dense.with_name(f"{name}-converted.safetensors")
    finetuned = dense.with_name(f"{name}.safetensors")
    done = convert_file(spec, recipe, raw, weights=dense, calib=calib, force=True)
    result = finetune(
        raw, data, finetuned, config, teacher=str(dense), device="cpu", force=True,
        on_event=stages,
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


def result_of(rows: Sequence[Row]) -> str:
    """The result in one sentence: of the smallest compact model of each kind."""
    parts = []
    for kind in MODELS:
        own = [row for row in rows if row.name.startswith(f"{kind},")]
        dense = own[0]
        row = min(own[1:], key=lambda r: r.ratio)
        change = 100 * (row.finetuned - dense.finetuned)
        parts.append(f"{kind} at {100 * row.ratio:.0f} % of its parameters: {change:+.1f} points")
    return "; ".join(parts)


def draw(rows: Sequence[Row], path: Path) -> None:
    """A picture: parameters stored, and accuracy after conversion and after fine-tuning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.suptitle(f"Test accuracy, {result_of(rows)}", fontsize=11)
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
    marks = [100 * r.finetuned for r in rows]
    marks += [100 * r.converted for r in rows if r.converted is not None]
    low, high = min(marks), max(marks)
    gap = max(high - low, 1.0) / 40
    for i, row in enumerate(rows):
        end = 100 * row.finetuned
        if row.converted is not None:
            right.plot([100 * row.converted, end], [i, i], color="#d1d5db", zorder=1)
            right.scatter(100 * row.converted, i, marker="o", color="#f59e0b", zorder=2)
        right.scatter(end, i, marker="D", color=colours[i], zorder=2)
        place = max(end, 100 * (row.converted or 0.0)) + gap
        right.text(place, i, f"{end:.1f}", va="center", fontsize=9)
    for marker, colour, label in (
        ("D", "#4b5563", "dense"),
        ("o", "#f59e0b", "converted and calibrated, no labels"),
        ("D", "#0f766e", "fine-tuned"),
    ):
        right.scatter([], [], marker=marker, color=colour, label=label)
    right.set_xlabel("top-1 on test digits, %")
    right.set_xlim(low - 2 * gap, high + 6 * gap)
    right.grid(axis="x", color="#e5e7eb")
    right.set_axisbelow(True)
    figure.legend(loc="outside lower right", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)


def _require(module: str, purpose: str) -> None:
    if importlib.util.find_spec(module) is None:
        package = {"sklearn": "scikit-learn"}.get(module, module)
        raise MissingExtra.of(package, "demo", purpose)
