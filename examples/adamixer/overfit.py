"""Learn 8 photos by heart, with the stock decoder and with LORS: does all of it learn?

    python examples/adamixer/overfit.py --photos coco128/images/train2017
        --annotations coco128/instances_train2017.json

Both decoders have the same sizes (a narrow LORS setting), the same seeds, steps and photos. The
backbone is a random ResNet-18 that stays as it is, so its maps of the photos are computed once.
Then the trained stock decoder is converted, and its answers are compared with those of the
paper's start, the shared weights alone. Results go to `benchmarks/results/adamixer_overfit.json`
and to `examples/adamixer/overfit.png`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder is the package `adamixer`

import tiedconv
from adamixer.conversion import recipe_for, reset_lors
from adamixer.detector import Backbone, Head
from adamixer.fitted import fitted, judged, trace, zero_residual
from adamixer.losses import set_loss
from adamixer.photos import Photo, average_precision, load_photos
from adamixer.settings import setting_of

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "adamixer_overfit.json"
PICTURE = Path(__file__).with_name("overfit.png")
KEEP = "folder to keep the trained heads in; those that are there already are not trained again"
SMALL: dict[str, Any] = {
    "queries": 50, "width": 128, "ffn": 512, "in_points": 16, "out_points": 64
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--finetune-steps", type=int, default=30, help="steps after the conversion")
    parser.add_argument("--heads", type=Path, default=".data/adamixer-heads", help=KEEP)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    photos = load_photos(args.photos, args.annotations, 8)
    channels, maps = cached(photos)
    runs: dict[str, Any] = {}
    heads: dict[str, nn.Module] = {}
    for name in ("stock", "lors"):
        heads[name] = make(name, channels)
        file = args.heads / f"{name}.pt"
        if file.exists():
            kept = torch.load(file)
            heads[name].load_state_dict(kept["state"])
            curve = kept["curve"]
        else:
            curve = train(name, heads[name], maps, photos, args.steps, args.rate)
            args.heads.mkdir(parents=True, exist_ok=True)
            torch.save({"state": heads[name].state_dict(), "curve": curve}, file)
        runs[name] = {"parameters": count(heads[name]), "curve": curve}
    record = {
        "setting": SMALL, "photos": [p.number for p in photos], "steps": args.steps,
        "torch": str(torch.__version__), "runs": runs,
        "starts": compare_starts(heads["stock"], maps, photos, args.finetune_steps, args.rate),
    }  # fmt: skip
    args.result.parent.mkdir(exist_ok=True, parents=True)
    args.result.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, args.picture)


def cached(photos: list[Photo]) -> tuple[list[int], list[Tensor]]:
    """Channels and maps of the photos, from a random ResNet-18."""
    torch.manual_seed(0)
    backbone = Backbone("resnet18", None)
    # In training mode, as the norms of a random network know no statistics but the batch's.
    with torch.no_grad():
        return backbone.channels, backbone(torch.stack([p.image for p in photos]))


def make(name: str, channels: list[int]) -> nn.Module:
    """A fresh head; the LORS one is the same, converted, with the paper's initial values."""
    torch.manual_seed(1)
    setting = setting_of("lors", **SMALL)
    head: nn.Module = Head(channels, setting)
    if name == "lors":
        head = tiedconv.convert(head, recipe=recipe_for(setting, scratch=True))
        reset_lors(head)
    return head


def compare_starts(
    stock: nn.Module, maps: list[Tensor], photos: list[Photo], steps: int, rate: float
) -> dict[str, Any]:  # fmt: skip
    """The trained stock decoder, converted in two ways, then trained on at a lower rate."""
    setting, reference = setting_of("lors", **SMALL), trace(stock, maps)
    found = {}
    for name, start in (("fitted", fitted), ("zero residual", zero_residual)):
        model = start(stock, recipe_for(setting, scratch=start is zero_residual))
        figures = judged(model, reference, maps, photos)
        found[name] = {**figures, "curve": train(name, model, maps, photos, steps, rate / 3)}
    return found


def train(
    name: str, head: nn.Module, maps: list[Tensor], photos: list[Photo], steps: int, rate: float
) -> list[dict[str, float]]:  # fmt: skip
    """Steps of 4 of the photos, at a falling rate; the loss and AP in 10 places or more."""
    every = max(1, min(15, steps // 10))
    torch.manual_seed(2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate, weight_decay=1e-4)
    curve: list[dict[str, float]] = []
    start, total = time.perf_counter(), 0.0
    order: list[int] = []
    for step in range(1, steps + 1):
        order = order or torch.randperm(len(photos)).tolist()
        chosen, order = order[:4], order[4:]
        warm = min(1.0, step / 25)
        for group in optimizer.param_groups:
            group["lr"] = rate * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        logits, boxes = head([m[chosen] for m in maps])
        loss = set_loss(logits, boxes, [photos[i].objects for i in chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % every == 0:
            ap, ap50 = precision(head, maps, photos)
            curve.append({"step": step, "loss": total / every, "ap": ap, "ap50": ap50})
            spent = time.perf_counter() - start
            print(f"{name} {step} {total / every:.3f} {ap:.3f} {ap50:.3f} {spent:.0f}s", flush=True)
            total = 0.0
    return curve


@torch.no_grad()
def precision(head: nn.Module, maps: list[Tensor], photos: list[Photo]) -> tuple[float, float]:
    """AP and AP50 of the last stage on the photos themselves."""
    head.eval()
    logits, boxes = head(maps)
    head.train()
    return average_precision(photos, logits[-1], boxes[-1])


def count(model: nn.Module) -> int:
    """Parameters of the decoder."""
    names = ("tied/", "decoder.")
    return sum(p.numel() for n, p in model.named_parameters() if n.startswith(names))


def draw(record: dict[str, Any], path: Path) -> None:
    """AP50 and the loss against steps from scratch, and AP50 after the conversion."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for name, run in record["runs"].items():
        label = f"{name}, {run['parameters'] / 1e6:.2f} M parameters"
        for axis, key in zip(axes, ("ap50", "loss"), strict=False):
            axis.plot(*_line(run["curve"], key), label=label)
    for name, start in record["starts"].items():
        steps, values = _line(start["curve"], "ap50")
        axes[2].plot([0, *steps], [start["ap50"], *values], label=name)
    titles = ("AP50, from scratch", "loss, from scratch", "AP50, trained stock converted")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="steps of 4 of the 8 photos")
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right")
    axes[2].legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(curve: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    return [point["step"] for point in curve], [point[key] for point in curve]


if __name__ == "__main__":
    main()
