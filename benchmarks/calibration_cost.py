"""Time and memory of a calibrated conversion, against one forward pass over the same images.

    python benchmarks/calibration_cost.py --images 512

ViT-B/16 of torchvision with random weights, random images of 224 px in memory. Parts are timed one
after the other in one process, each with the batch size that `convert --calib` takes: a forward
pass, the statistics, the plan and fit of `lowrank` at 50 %, as `--effort fast` does; then, for
`--effort normal`, the blocks and the whole. With `--sample N` only N steps are taken for each
block and for the whole, on 64 of the images, and the file tells the time that all steps on all
images would take: a forecast, and called so. Peak memory is the process's own (on a GPU, the
allocator's too). Ratios are to the forward pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tiedconv.calibration import CalibConfig, Fitting, Joint, fit_blocks, gather_statistics
from tiedconv.conversion.candidates import memory_store, tie_fit
from tiedconv.conversion.pipeline import plan_on
from tiedconv.conversion.stages import align, fit
from tiedconv.data import TensorList
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import open_source

SAMPLED = 64
"""Images of a sample."""

RESULT = Path(__file__).parent / "results" / "calibration_cost.json"


@dataclass
class Steps:
    """Listens to a fit: how long the steps of each kind took."""

    seconds: dict[type, list[float]] = field(default_factory=dict)
    last: tuple[Any, float] | None = None
    spans: int = 0

    def __call__(self, event: Any) -> None:
        now = time.perf_counter()
        if isinstance(event, Fitting):
            self.spans = event.count
        if not isinstance(event, Fitting | Joint):
            self.last = None
            return
        if self.last and type(self.last[0]) is type(event) and event.step > self.last[0].step:
            each = (now - self.last[1]) / (event.step - self.last[0].step)
            self.seconds.setdefault(type(event), []).append(each)
        self.last = event, now

    def forecast(self, taken: float, sample: int, images: int) -> dict[str, float]:
        """The seconds of all steps on so many images, from those of a sample of both."""
        span, joint = (statistics.median(self.seconds[kind]) for kind in (Fitting, Joint))
        normal, fitted = CalibConfig(), images - images // 10  # a tenth is held out
        steps, joint_steps = normal.span_steps(fitted), normal.total_joint_steps(fitted)
        once = taken - sample * (self.spans * span + joint)  # each image once, through every block
        return {
            "seconds": once * images / SAMPLED + steps * self.spans * span + joint_steps * joint,
            "span_step": span, "joint_step": joint, "span_steps": steps, "spans": self.spans,
            "joint_steps": joint_steps,
        }  # fmt: skip


class Parts:
    """Times parts of the work, one after the other."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.figures: dict[str, dict[str, float]] = {}

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        """Does a part of the work."""
        start = time.perf_counter()
        result = work()
        if self.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        self.figures[name] = {"seconds": seconds, "peak_gb": peak}
        if self.device == "cuda":
            self.figures[name]["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(name, self.figures[name], flush=True)
        return result


def unlabelled(images: torch.Tensor) -> TensorList:
    """Images, all of one class."""
    return TensorList(images, torch.zeros(len(images), dtype=torch.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--effort", choices=["fast", "normal"], default="normal")
    parser.add_argument("--sample", type=int, help="take so many steps, and forecast the rest")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = open_source(args.model, None, "none", seed=0)
    model.eval()
    images = torch.randint(0, 256, (args.images, 3, 224, 224), dtype=torch.uint8)
    data = unlabelled(images)
    planned = plan_on(model, Recipe.of("lowrank", params="50%"))
    info, outlined = planned.info, planned.outlines[0]
    parts = Parts(device)

    @torch.no_grad()
    def forward() -> None:
        placed = copy.deepcopy(model).to(device)
        for start in range(0, args.images, 32):
            placed(images[start : start + 32].to(device).float() / 255)

    parts.timed("forward", forward)
    weights = outlined.weights
    statistics = parts.timed(
        "statistics", lambda: gather_statistics(model, weights, data, device=device, workers=0)
    )
    model.cpu()
    with torch.no_grad():
        workspace = parts.timed("align", lambda: align(outlined, memory_store(model, info)))
        fitted = parts.timed("fit", lambda: fit(info, outlined, workspace, statistics))
    figures: dict[str, Any] = {}
    if args.effort == "normal":
        student = copy.deepcopy(model)
        tie_fit(student, fitted, {})
        figures = blocks(parts, student, model, images, args.sample)
    forward_seconds = parts.figures["forward"]["seconds"]
    fast = sum(parts.figures[name]["seconds"] for name in ("statistics", "align", "fit"))
    figures |= {
        "model": args.model, "images": args.images, "effort": args.effort, "cost": fitted.cost,
        "ratio_fast": fast / forward_seconds, "parts": parts.figures,
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }  # fmt: skip
    if args.effort == "normal":
        normal = figures.get("forecast", parts.figures.get("blocks"))["seconds"]
        figures["ratio_normal"] = (fast + normal) / forward_seconds
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


def blocks(
    parts: Parts, student: torch.nn.Module, model: torch.nn.Module, images: torch.Tensor,
    sample: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Fits the blocks and the whole; with a sample of steps, the forecast of all of them."""
    steps = Steps()
    config = CalibConfig(steps=sample, joint_steps=sample)
    some = unlabelled(images if sample is None else images[:SAMPLED])
    name = "blocks" if sample is None else f"blocks, {sample} steps on {len(some)} images"
    parts.timed(
        name,
        lambda: fit_blocks(
            student, model, some, config, device=parts.device, workers=0, on_event=steps
        ),
    )
    if sample is None:
        return {}
    taken = parts.figures[name]["seconds"]
    return {"sample": sample, "forecast": steps.forecast(taken, sample, len(images))}


if __name__ == "__main__":
    main()
