"""Accuracy against bytes where training takes part: `auto --bytes` then `finetune`, and others.

    pip install -r benchmarks/accuracy_requirements.txt
    python benchmarks/frontier_trained.py --model vit-real --weights VIT.safetensors --data CIFAR10

Every method gets the same 512 calibration images and then the same training: the loop and the
defaults of `finetune`, 200 steps of 64 training images without labels, the original as teacher, the
state of the least loss on 512 held-out training images. Judged on all test images, three seeds.

- `auto`: `convert --bytes`, then its integers are trained. Its learning rate is the default's, that
  a test finds; the others get the best of that and of 5e-5, by the held-out loss of seed 0.
- `qat`: the dense model in integers with trained scales (a row, or groups), begun at its GPTQ form.
- `svd8`: whitened SVD of each layer, trained, then rounded to 8 bits a row.
- `pruned8`: torch-pruning, the better of two ways by the divergence on the calibration images,
  trained, then rounded to 8 bits a row.

Sizes are those of real files, scales and all that is not integers in float16. Results go to
`benchmarks/results/frontier_trained.json`, row by row; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import torch
from finetuning import Teacher
from frontier import MODELS, baseline, divergence, judged, matrices, ours, outputs, quantised, saved
from models import MEAN, STD, Pixels, normalised, read_pixels
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration import gather_statistics
from tiedconv.commands.finetune import pack
from tiedconv.core.packed_codes import packed
from tiedconv.data import TensorList
from tiedconv.runtime.soft_codes import soften
from tiedconv.training import TrainConfig, train

RESULT = Path(__file__).parent / "results" / "frontier_trained.json"
INT8 = 0.263
"""What 8 bits a row take of float32, with all that is no matrix in float16."""

SIZES: dict[str, tuple[Any, ...]] = {
    "auto": (14, 11, 9, 6, 4, 3), "qat": ((4, 0), (3, 64), (2, 32)),
    "svd8": (9, 4), "pruned8": (9, 4),
}  # fmt: skip
"""Percent of the float32 bytes; of `qat` bits and group."""

RATES = (5e-5,)
"""Learning rates that are tried besides the one that is found."""

Made = tuple[nn.Module, Callable[[nn.Module], tuple[nn.Module, int]]]
"""A model to train, and what makes of it the model to judge and the bytes of its file."""


class Rounded(nn.Module):
    """A weight in integers, with gradients as if it were not (straight-through).

    Args:
        bits: of each integer.
        scales: of the groups of columns, `(out, groups, 1)`.
        shape: of the weight.
    """

    def __init__(self, bits: int, scales: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.bits, self.shape = bits, shape
        self.largest = 2 ** (bits - 1) - 1 if bits > 2 else 1
        self.register_buffer("scales", scales.float())
        self.log_change = nn.Parameter(torch.zeros_like(scales, dtype=torch.float32))

    def integers(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The whole numbers, their gradient that of `weight / unit`, and the units."""
        matrix = weight.flatten(1)
        half = (self.scales * self.log_change.exp()).half().float()
        scales = self.scales * self.log_change.exp()
        scales = scales + (half - scales).detach()  # as the file stores them
        columns = matrix.shape[1]
        width = -(-columns // scales.shape[1])
        units = scales.expand(-1, -1, width).reshape(len(matrix), -1)[:, :columns]
        ratio = (matrix / units).clamp(-self.largest, self.largest)
        return ratio + (ratio.round() - ratio).detach(), units

    def forward(self, weight: Tensor) -> Tensor:
        values, units = self.integers(weight)
        return (values * units).reshape(self.shape)


def qat(model: nn.Module, moments: dict[str, Tensor], size: tuple[int, int]) -> Made:
    """The dense model in integers of one width and group."""
    found, (bits, group) = copy.deepcopy(model), size
    for name, matrix in matrices(model).items():
        moment = moments.get(name)
        if moment is not None and len(moment) != matrix.shape[1]:
            moment = None
        _, scales, whole = quantised(matrix, moment, bits, group)
        layer = found.get_submodule(name.removesuffix(".weight"))
        units = Rounded(bits, scales, layer.weight.shape)
        _, unit = units.integers(layer.weight)
        with torch.no_grad():  # the nearest to the original that is rounded as GPTQ rounds it
            near = matrix.clamp(whole - 0.49 * unit, whole + 0.49 * unit)
            layer.weight.copy_(near.reshape(layer.weight.shape))
        parametrize.register_parametrization(layer, "weight", units)
    return found, written_qat


@torch.no_grad()
def written_qat(model: nn.Module) -> tuple[nn.Module, int]:
    """The trained integers in a file."""
    stored = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            own = module.parametrizations.weight
            values, _ = own[0].integers(own.original)
            scales = own[0].scales * own[0].log_change.exp()
            stored[f"{name}.codes"] = packed(values.round(), own[0].bits)
            stored[f"{name}.scales"] = scales.half()
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    coded = {name.removesuffix(".codes") + ".weight" for name in stored}
    return model, saved(model, stored, coded)


def in_eight_bits(model: nn.Module) -> tuple[nn.Module, int]:
    """A trained model of floats, rounded."""
    return baseline(model, None, 8, 0)


def svd8(context: baselines.Context, size: float) -> Made:
    """Two factors for each layer."""
    return baselines.whitened_svd(context, size / INT8), in_eight_bits


def pruned8(context: baselines.Context, images: Tensor, size: float) -> Made:
    """Channels removed."""
    expected = outputs(context.dense, images)
    forms = [
        baselines.torch_pruning(context, size / INT8, way) for way in ("uniform", "isomorphic")
    ]
    return min(forms, key=lambda m: divergence(outputs(m, images), expected)), in_eight_bits


def auto(model: nn.Module, images: Any, effort: str, size: float) -> Made:
    """Ours, its integers to be trained."""
    tied = ours(model, images, size, effort)[0]
    soften(tied)
    return tied, written_auto


def written_auto(model: nn.Module) -> tuple[nn.Module, int]:
    """Packed as `finetune` does it."""
    assert pack(model) is None
    with tempfile.TemporaryDirectory() as folder:
        return model, tiedconv.save(model, Path(folder) / "m.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("vit-real", "resnet-narrow"), required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="*", default=[*SIZES])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS[args.model](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    pixels = read_pixels(args.data)
    dense = 4 * sum(t.numel() for t in model.state_dict().values())
    expected = outputs(model, images[1])
    learned, held = data_of(pixels["train"]), data_of(pixels["val"].some(512), "none")
    calib = pixels["train"].some(512)
    shown_later = normalised(pixels["val"].some(512).images)
    wanted_later = outputs(model, shown_later)
    context = baselines.Context(args.model, model, Teacher(model), pixels, calib)
    shown = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
    found = gather_statistics(model, dict.fromkeys(matrices(model), False), shown, workers=0)
    moments = {n: m.right for n, m in found.metrics.items() if m.right is not None}
    ways: dict[str, Callable[[Any], Made]] = {
        "auto": partial(auto, model, images, args.effort), "qat": partial(qat, model, moments),
        "svd8": partial(svd8, context), "pruned8": partial(pruned8, context, images[0]),
    }  # fmt: skip
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []
    for method in args.methods:
        for size in SIZES[method]:
            asked = list(size) if isinstance(size, tuple) else size
            key = {"model": args.model, "method": method, "asked": asked, "steps": args.steps}
            todo = [
                seed for seed in range(args.seeds)
                if not any(all(r[k] == v for k, v in {**key, "seed": seed}.items()) for r in rows)
            ]  # fmt: skip
            if not todo:
                continue
            lr = None
            for seed in todo:
                start, best = time.process_time(), None
                # Of the others the rate is searched wider, once: the test finds ours.
                for tried in (None, *RATES) if method != "auto" and lr is None else (lr,):
                    made, written = ways[method](size)
                    config = TrainConfig(
                        steps=args.steps, epochs=None, batch_size=64, distill_weight=1.0, lr=tried,
                        seed=seed, workers=0, eval_every_epoch=False, augment="crop",
                    )  # fmt: skip
                    result = train(made, learned, held, config, teacher=model, device="cpu")
                    apart = divergence(outputs(made.eval(), shown_later), wanted_later)
                    if best is None or apart < best[0]:
                        best = apart, result, made, written
                assert best is not None
                _, result, made, written = best
                lr = result.lr if method != "auto" else None
                final, size_of_file = written(made.eval())
                rows.append({
                    **key, "seed": seed, "bytes": size_of_file,
                    "percent": round(100 * size_of_file / dense, 2),
                    **judged(final, images, expected), "lr": result.lr, "kept": result.kept_step,
                    "seconds": round(time.process_time() - start),
                })  # fmt: skip
                print(rows[-1], flush=True)
                text = ",\n".join(map(json.dumps, rows))
                args.result.write_text(f"[\n{text}\n]\n")


def data_of(pixels: Pixels, augment: str = "crop") -> TensorList:
    """Images in memory; the labels are not used."""
    return TensorList(pixels.images, pixels.labels, mean=MEAN, std=STD, augment=augment)


if __name__ == "__main__":
    main()
