"""What each part of `auto --bytes` is worth, on the CIFAR ViT, before any training.

    python benchmarks/frontier_ablation.py --weights VIT.safetensors --data CIFAR10

512 calibration images without labels, all test images judged, as in `frontier.py`; each row leaves
out or replaces one part of the conversion. A file that a setting can't make so small is a row
without figures. Results go to `benchmarks/results/frontier_ablation.json`, row by row; rows that
are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from frontier import MODELS, judged, outputs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration import blockwise
from tiedconv.calibration.config import CalibConfig
from tiedconv.calibration.objectives import JointObjective
from tiedconv.conversion import byte_plans, byte_search
from tiedconv.conversion import rounding as of_models
from tiedconv.conversion.calibrate import Calibration
from tiedconv.numerics import rounding as of_matrices
from tiedconv.planning import byte_budget
from tiedconv.runtime.tie import state_of

RESULT = Path(__file__).parent / "results" / "frontier_ablation.json"
ASKED = (10, 8, 6, 4)
Patch = tuple[ModuleType | type, str, Any]


def to_nearest(moment: Tensor) -> Any:
    """No error is made good by later columns; scales know what an error costs all the same."""
    return of_matrices._Side(moment.diagonal().clone(), torch.eye(len(moment)).double())


def no_refit(
    weights: Any, factors: Mapping[str, Tensor], targets: Any, measures: Any, free: Any
) -> Any:
    """The other factors stay as they are."""
    return factors


def nothing(*_: Any) -> bool:
    """Integers are not made trainable."""
    return True


def blocks_alone(*args: Any) -> Iterator[Any]:
    """Without the patch embedding, the table of positions and the classifier."""
    outside = {"patch_embed.proj.weight", "pos_embed", "cls_token", "head.weight"}
    return (part for part in ALL_KEPT(*args) if part[0] not in outside)


ALL_KEPT = of_models._kept_matrices
COLUMNS_ALONE: Patch = (of_matrices, "ROW_BLOCKS", 1)
NEAREST: Patch = (of_matrices._Side, "of", staticmethod(to_nearest))
NO_REFIT: Patch = (of_models, "refit", no_refit)
BITS_ALONE: Patch = (byte_budget, "SHARES", ())
FORECAST_ALONE: Patch = (byte_search, "COMPARED", 1)
NO_FINER: Patch = (byte_plans, "FINER", ())
KEPT_STAY: Patch = (of_models, "_kept_matrices", blocks_alone)
INTEGERS_STAY: tuple[Patch, Patch] = (
    (byte_search, "soften", nothing),
    (byte_search, "harden", nothing),
)

TRUSTED: Patch = (byte_search, "RIDGES", ())
HIGHEST: tuple[Patch, Patch] = (
    (blockwise, "MUCH", 1e-9),
    (blockwise, "MUCH_OF_UNIT", 1e-9),
)
NOT_AUGMENTED: Patch = (JointObjective, "augments", False)

SETTINGS: dict[str, tuple[str, str | None, tuple[Patch, ...]]] = {
    "all parts, without block fits": ("fast", None, ()),
    "no error feedback: to nearest, no refit": ("fast", None, (NEAREST, COLUMNS_ALONE, NO_REFIT)),
    "no error feedback: to nearest": ("fast", None, (NEAREST, COLUMNS_ALONE)),
    "error feedback over columns alone": ("fast", None, (COLUMNS_ALONE,)),
    "no refit of the other factors": ("fast", None, (NO_REFIT,)),
    "the whole model rounded, nothing shared": ("fast", None, (BITS_ALONE,)),
    "the forecast decides, outputs are not compared": ("fast", None, (FORECAST_ALONE,)),
    "the same, no plans between": ("fast", None, (FORECAST_ALONE, NO_FINER)),
    "measured inputs trusted as they are": ("fast", None, (TRUSTED,)),
    "patches, positions and classifier in float16": ("fast", None, (KEPT_STAY,)),
    "ranks first (50 % of the parameters), bits after": ("fast", "50%", ()),
    "ranks first (30 %), bits after": ("fast", "30%", ()),
    "all parts, with block fits": ("normal", None, ()),
    "block fits, images not augmented": ("normal", None, (NOT_AUGMENTED,)),
    "block fits, the highest learning rate": ("normal", None, HIGHEST),
    "block fits, integers not trained": ("normal", None, INTEGERS_STAY),
}
"""What it is called: effort, budget of parameters, and what is replaced."""


@contextmanager
def replaced(patches: tuple[Patch, ...]) -> Iterator[None]:
    """Within it, parts of the conversion are other ones."""
    with ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(patch.object(where, name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", nargs="*", type=int, default=ASKED)
    parser.add_argument("--settings", nargs="*", default=[*SETTINGS])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS["vit-real"](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    expected = outputs(model, images[1])
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []
    for size in args.sizes:
        for setting in args.settings:
            if any(r["asked"] == size and r["setting"] == setting for r in rows):
                continue
            rows.append({"setting": setting, "asked": size, **row(
                model, images[0], size, setting, lambda m: judged(m, images, expected)
            )})  # fmt: skip
            print(rows[-1], flush=True)
            args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def row(
    model: nn.Module,
    images: Tensor,
    size: int,
    setting: str,
    judge: Callable[[nn.Module], dict[str, float]],
) -> dict[str, Any]:
    """One conversion and how its model answers."""
    effort, params, patches = SETTINGS[setting]
    data = TensorDataset(images, torch.zeros(len(images), dtype=torch.int64))
    calib = Calibration(data, config=CalibConfig(effort=effort), workers=0)
    start = time.process_time()
    try:
        with replaced(patches):
            tied = tiedconv.convert(model, "auto", bytes=f"{size}%", params=params, calib=calib)
    except tiedconv.TiedconvError as error:
        return {"error": error.code}
    stored = state_of(tied).plan.stored
    return {**judge(tied), "parameters": stored, "seconds": round(time.process_time() - start)}


if __name__ == "__main__":
    main()
