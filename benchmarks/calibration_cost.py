"""Time and memory of a calibrated conversion, against one forward pass over the same images.

    python benchmarks/calibration_cost.py --images 512

ViT-B/16 of torchvision with random weights, random images of 224 px in memory, batches of 16.
Parts are timed one after the other in one process: a forward pass, the moments, the plan and fit of
`lowrank` at 50 %, then blocks and the whole at `normal` effort (left out with `--effort fast`).
Peak memory is the process's own (on a GPU, the allocator's too). Ratios are to the forward pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tiedconv.anatomy import examine
from tiedconv.binding import tie
from tiedconv.calibration import CalibConfig, fit_blocks, gather_moments
from tiedconv.data import TensorList
from tiedconv.planner import fit_plan, make_plan, weights_of
from tiedconv.recipe import Recipe
from tiedconv.sources import open_source

RESULT = Path(__file__).parent / "results" / "calibration_cost.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--model", default="vit_b_16")
    parser.add_argument("--effort", choices=["fast", "normal"], default="normal")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = open_source(args.model, None, "none", seed=0)
    model.eval()
    images = torch.randint(0, 256, (args.images, 3, 224, 224), dtype=torch.uint8)
    data = TensorList(images, torch.zeros(args.images, dtype=torch.int64))
    anatomy, recipe = examine(model), Recipe.of("lowrank", params="50%")
    own = {n: t.detach() for n, t in model.state_dict().items()}
    tensors = {n: own[n] for n in anatomy.shapes}
    parts: dict[str, dict[str, float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        parts[name] = {"seconds": seconds, "peak_gb": peak}
        if device == "cuda":
            parts[name]["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(name, parts[name], flush=True)
        return result

    @torch.no_grad()
    def forward() -> None:
        placed = copy.deepcopy(model).to(device)
        for start in range(0, args.images, 16):
            placed(images[start : start + 16].to(device).float() / 255)

    timed("forward", forward)
    moments = timed(
        "moments",
        lambda: gather_moments(
            model, weights_of(anatomy, recipe), data, batch_size=16, device=device, workers=0
        ),
    )
    model.cpu()
    with torch.no_grad():
        plan, moved = timed(
            "plan", lambda: make_plan(anatomy, recipe, tensors, measure=lambda _: moments.metrics)
        )
        plan, factors, cost = timed("fit", lambda: fit_plan(plan, moved, None, moments.metrics))
    if args.effort == "normal":
        student = copy.deepcopy(model)
        tie(student, plan, factors)
        config = CalibConfig(batch_size=16)
        timed("blocks", lambda: fit_blocks(student, model, data, config, device=device, workers=0))
    whole = sum(p["seconds"] for name, p in parts.items() if name != "forward")
    figures = {
        "model": args.model, "images": args.images, "effort": args.effort, "cost": cost,
        "ratio": whole / parts["forward"]["seconds"], "parts": parts,
        "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
    }  # fmt: skip
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
