"""`finetune` by its defaults on a pretrained EfficientNet-Lite0, against what its defaults were.

    python benchmarks/finetune_start.py --weights LITE0.safetensors --photos PHOTOS

The model is converted to a share of its parameters (`--effort fast`, 250 photos), then trained by
distillation alone: 40 steps of 16 of 500 photos, judged on 334 others. `before` is a learning rate
of 5e-4, batch norms with the statistics of each batch, and the last state; `now` is the default: a
rate that is found, norms as the teacher bears them, and the best state by held-out loss. Results
go to `benchmarks/results/finetune_start.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import ImageList, eval_transform, open_images
from tiedconv.sources import Preprocess
from tiedconv.sources.torchvision_compat import import_torchvision
from tiedconv.training import TrainConfig, train
from tiedconv.training.events import KeptBest, RateFound
from tiedconv.training.trainer import TrainerSetup

import_torchvision()
import timm  # noqa: E402

RESULT = Path(__file__).parent / "results" / "finetune_start.json"
HALF = (0.5, 0.5, 0.5)


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All photos of a folder of class folders, and their labels."""
    found = ImageList(open_images(folder), eval_transform(Preprocess(224, 256, HALF, HALF)))
    items = [found[i] for i in range(len(found))]
    return torch.stack([i[0] for i in items]), torch.tensor([i[1] for i in items])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--params", default="70%")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x, y = read(args.photos)
    original = timm.create_model("tf_efficientnet_lite0")
    original.load_state_dict(load_file(args.weights))
    original.eval()
    shown = TensorDataset(x[::2][:250], y[::2][:250])
    learned, judged = TensorDataset(x[::2], y[::2]), TensorDataset(x[1::2][:334], y[1::2][:334])
    config = CalibConfig(effort="fast")
    tied = tiedconv.convert(
        original, "auto", params=args.params,
        calib=Calibration(shown, images=250, config=config, workers=0),
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    usual: dict[str, Any] = {
        "steps": args.steps, "epochs": None, "batch_size": 16, "distill_weight": 1.0,
        "augment": "none", "workers": 0,
    }  # fmt: skip
    frozen = TrainerSetup.batch_statistics_harm
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.safetensors"
        tiedconv.save(tied, path)
        for seed in range(args.seeds):
            for name in ("before", "now"):
                before = {"lr": 5e-4, "keep_best": False} if name == "before" else {}
                # What the option was before there was one.
                TrainerSetup.batch_statistics_harm = (  # type: ignore[method-assign]
                    (lambda _: False) if name == "before" else frozen
                )
                model = tiedconv.load(path, model=timm.create_model("tf_efficientnet_lite0"))
                facts: dict[str, Any] = {}

                def note(event: object, facts: dict[str, Any] = facts) -> None:
                    if isinstance(event, RateFound):
                        facts["lr"] = event.lr
                    if isinstance(event, KeptBest):
                        facts["kept"] = [event.kept, event.start, event.loss]

                start = time.process_time()
                result = train(
                    model, learned, judged, TrainConfig(**usual, **before, seed=seed),
                    teacher=original, device="cpu", on_event=note,
                )  # fmt: skip
                rows.append({
                    "model": "tf_efficientnet_lite0", "params": args.params, "how": name,
                    "seed": seed, "start": round(result.top1_before, 4),
                    "end": round(result.top1, 4), **facts,
                    "seconds": round(time.process_time() - start),
                })  # fmt: skip
                print(rows[-1], flush=True)
    args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
