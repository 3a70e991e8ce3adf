"""A detector's decoder at half and a third of its size: average precision at each step.

DEIMv2-Atto, pretrained on COCO, on photos in COCO's form: converted without data, converted with
the training photos (without their boxes), and then distilled for a short while by the original's
answers. The decoder is the stack of decoder layers; budgets are shares of its parameters.

    python examples/deimv2/model.py deimv2_atto_coco_deploy_statedict.safetensors atto.safetensors
    python benchmarks/detection.py --weights atto.safetensors --data COCO128 --onnx atto.onnx
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import tiedconv  # noqa: E402
from tiedconv import sources  # noqa: E402
from tiedconv.calibration import CalibConfig  # noqa: E402
from tiedconv.commands.convert_file import convert_file  # noqa: E402
from tiedconv.commands.evaluate import evaluate  # noqa: E402
from tiedconv.commands.finetune import finetune  # noqa: E402
from tiedconv.conversion.calibrate import Calibration  # noqa: E402
from tiedconv.data import open_images  # noqa: E402
from tiedconv.detection import (  # noqa: E402
    DetectionList,
    Detections,
    average_precision,
    detections_of,
)
from tiedconv.planning.recipe import Recipe  # noqa: E402
from tiedconv.training import TrainConfig  # noqa: E402
from tiedconv.utils.plotting import new_figure, write_figure  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "detection.json"
PICTURE = ROOT / "docs" / "detection.jpg"
SPEC = "examples.deimv2.model:deimv2_atto"
DECODER = "model.decoder.layers."
INCLUDE = (f"{DECODER}*", "*sampling_offsets*", "*attention_weights*")
"""The last two are private unless they are named; here they are a quarter of the decoder."""

SHOWN = 4  # photos in the picture
SURE = 0.4  # the least score of a box that is drawn


class Bench:
    """The measurements of one run of the script."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.source = sources.open_source(SPEC, {}, args.weights)
        named = {n: p.numel() for n, p in self.model.named_parameters()}
        self.decoder = sum(count for name, count in named.items() if name.startswith(DECODER))
        self.whole = sum(named.values())
        args.work.mkdir(parents=True, exist_ok=True)
        self.store: dict[str, Any] = {}
        if args.result.is_file():
            self.store = json.loads(args.result.read_text())
        self.store["settings"] = {
            "decoder": self.decoder, "whole": self.whole, "effort": args.effort,
            "epochs": args.epochs, "batch": args.batch_size, "lr": args.lr,
            "machine": platform.processor() or platform.machine(), "torch": torch.__version__,
        }  # fmt: skip

    def run(self) -> None:
        """Everything that is not in the result file yet."""
        runs = self.store.setdefault("runs", {})
        if "dense" not in runs:
            runs["dense"] = self.score(SPEC, weights=self.args.weights)
        if self.args.onnx is not None and "onnx" not in runs:
            runs["onnx"] = {"ap": self.onnx()}
        self.write()
        for scheme in self.args.schemes:
            for share in self.args.budgets:
                for seed in self.args.seeds:
                    key = f"{scheme}/{share}/{seed}"
                    if key not in runs:
                        runs[key] = self.convert(scheme, share, seed)
                        self.write()
                    print(key, runs[key], flush=True)

    def convert(self, scheme: str, share: int, seed: int) -> dict[str, Any]:
        """The three steps of one scheme at one size."""
        budget = self.whole - round(self.decoder * (100 - share) / 100)
        recipe = Recipe.of(scheme, params=str(budget), include=INCLUDE)
        found: dict[str, Any] = {}
        start = time.perf_counter()
        for step, calib in (("free", None), ("calibrated", self.calibration(seed))):
            file = self.file(scheme, share, seed, step)
            done = convert_file(
                SPEC, recipe, file, weights=self.args.weights, force=True, seed=seed, calib=calib
            )
            stored = done.plan.stored
            found |= {"parameters": stored, "decoder": stored - (self.whole - self.decoder)}
            found[step] = self.score(file)
            found[f"{step}_seconds"] = round(time.perf_counter() - start, 1)
        config = TrainConfig(
            epochs=self.args.epochs, batch_size=self.args.batch_size, lr=self.args.lr,
            distill_weight=1.0, only=("*decoder*",), seed=seed, workers=0, augment="flip",
            eval_every_epoch=False, weight_decay=0.0,
        )  # fmt: skip
        distilled = self.file(scheme, share, seed, "distilled")
        finetune(
            file, self.args.data, distilled, config, teacher=str(self.args.weights),
            force=True, trust_code=True,
        )  # fmt: skip
        found["distilled"] = self.score(distilled)
        found["distilled_seconds"] = round(time.perf_counter() - start, 1)
        return found

    def calibration(self, seed: int) -> Calibration:
        """All training photos, their boxes unseen."""
        return Calibration(
            self.args.data, images=128, workers=0,
            config=CalibConfig(effort=self.args.effort, seed=seed),
        )  # fmt: skip

    def file(self, scheme: str, share: int, seed: int, step: str) -> Path:
        """Where a model is kept."""
        name = f"{scheme}-{share}-{seed}-{step}.safetensors"
        return Path(self.args.work) / name

    def score(self, model: str | Path, **options: Any) -> dict[str, float]:
        """Average precision on the validation photos."""
        done = evaluate(model, self.args.data, workers=0, trust_code=True, **options)
        return {"ap": done.result.metrics["ap"], "ap50": done.result.metrics["ap50"]}

    def onnx(self) -> float:
        """Of the published ONNX file, by its own post-processing."""
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.args.onnx))
        data = self.photos()
        found: dict[int, Detections] = {}
        for i in range(len(data)):
            image, number = data[i]  # type: ignore[misc]
            feed = {
                "images": image[None].numpy(),
                "orig_target_sizes": np.ones((1, 2), np.int64),  # so boxes are shares
            }
            labels, boxes, scores = (torch.from_numpy(x[0])[:100] for x in session.run(None, feed))
            middle = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
            found[number] = Detections(scores, labels, middle)
        objects = data.task.objects
        return average_precision(found, objects, range(len(objects.names)))["ap"]

    def photos(self) -> DetectionList:
        """The validation photos."""
        assert self.source.preprocess is not None
        return DetectionList(open_images(self.args.data), self.source.preprocess)

    def write(self) -> None:
        """Keep what there is."""
        self.args.result.write_text(json.dumps(self.store, indent=1) + "\n")

    def draw(self) -> None:
        """Boxes of the original and of compact models on the photos with the most objects."""
        data = self.photos()
        objects = data.task.objects
        sizes = objects.sizes[:, 0] / objects.sizes[:, 1]
        counts = objects.starts[1:] - objects.starts[:-1]
        wide = [i for i in range(len(data)) if 1.2 < sizes[i] < 1.6 and 4 <= counts[i] <= 12]
        chosen = wide[:SHOWN]
        scheme, share = self.args.schemes[0], self.args.budgets[0]
        files = {
            f"{scheme}, {share} % of the decoder\n{title}": self.file(scheme, share, 0, step)
            for step, title in (("free", "without data"), ("distilled", "calibrated and distilled"))
        }
        models = {"original": self.model.eval()}
        models |= {n: tiedconv.load(f, trust_code=True).eval() for n, f in files.items()}
        figure = new_figure(3.2 * len(chosen), 2.5 * len(models))
        axes = figure.subplots(len(models), len(chosen), squeeze=False)
        for row, (name, model) in zip(axes, models.items(), strict=True):
            for axis, i in zip(row, chosen, strict=True):
                draw_boxes(axis, data, i, model)
            row[0].set_ylabel(name, fontsize=9)
        write_figure(figure, PICTURE, force=True)


def draw_boxes(axis: Any, data: DetectionList, index: int, model: torch.nn.Module) -> None:
    """One photo with what a model finds in it."""
    from matplotlib.patches import Rectangle

    image, _ = data[index]  # type: ignore[misc]
    with torch.no_grad():
        found = detections_of(model(image[None]), model)[0]
    names = data.task.objects.names
    width, height = data.task.objects.sizes[data.label(index)].tolist()
    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), aspect="equal")
    axis.set_xticks([])
    axis.set_yticks([])
    for score, label, (x, y, w, h) in zip(
        found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True
    ):
        if score < SURE:
            continue
        colour = f"C{label % 10}"
        corner = ((x - w / 2) * width, (y - h / 2) * height)
        axis.add_patch(Rectangle(corner, w * width, h * height, fill=False, ec=colour, lw=1.4))
        axis.text(
            *corner, f"{names[label]} {score:.2f}", fontsize=5.5, color="white", va="bottom",
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8}, clip_on=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", type=Path, default=ROOT / ".data/models/deimv2-atto.safetensors"
    )
    parser.add_argument("--data", type=Path, default=ROOT / ".data/coco128")
    parser.add_argument("--onnx", type=Path, default=None)
    parser.add_argument("--schemes", nargs="+", default=["lors"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 30])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--epochs", type=float, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--work", type=Path, default=ROOT / ".data/detection")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--draw-only", action="store_true")
    args = parser.parse_args()
    bench = Bench(args)
    if not args.draw_only:
        bench.run()
    bench.draw()


if __name__ == "__main__":
    main()
