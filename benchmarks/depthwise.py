"""Depthwise kernels of EfficientNet-Lite0 as integers, all else in float32: what rounding costs.

    python benchmarks/depthwise.py --weights LITE0.safetensors --data PHOTOS

Each kernel is rounded to nearest, or with error feedback: by how alike neighbouring positions are
in any image, by the moments of all channels together (as `convert` does with images), or by those
of its own channel, which `convert` does not keep. Moments are of 32 photos; the KL divergence is
that of the photos that nothing was fitted to. Results go to `benchmarks/results/depthwise.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from frontier import MODELS, divergence, outputs
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tiedconv.numerics.rounding import alike_inputs, in_bits

RESULT = Path(__file__).parent / "results" / "depthwise.json"
WIDTHS, SHOWN = (8, 6, 5, 4), 32


def kernels(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The depthwise convolutions."""
    named = model.named_modules()
    return {n: m for n, m in named if isinstance(m, nn.Conv2d) and m.groups == m.out_channels > 1}


@torch.no_grad()
def moments(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """By convolution: of the positions under the kernel, `(channels, k * k, k * k)`."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Conv2d, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module.padding, tuple)
        high, wide = module.padding
        x = F.pad(given[0], (wide, wide, high, high))
        seen = F.unfold(x, module.kernel_size, stride=module.stride).double()
        seen = seen.reshape(len(x), x.shape[1], module.weight[0].numel(), -1)
        found[name] = torch.einsum("ncip,ncjp->cij", seen, seen)

    hooks = [m.register_forward_pre_hook(partial(note, n)) for n, m in kernels(model).items()]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def of_its_channel(flat: Tensor, bits: int, own: Tensor) -> Tensor:
    """Each row by a moment of its own."""
    rows = []
    for row, moment in zip(flat, own, strict=True):
        seen = bool(moment.diagonal().sum() > 0)
        rows.append(in_bits(row[None], bits, moment if seen else None).matrix)
    return torch.cat(rows)


Way = Callable[[Tensor, int, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "to nearest": lambda flat, bits, own: in_bits(flat, bits).matrix,
    "positions alike": lambda flat, bits, own: (
        in_bits(flat, bits, alike_inputs(flat.shape[1])).matrix
    ),
    "moments of all channels": lambda flat, bits, own: in_bits(flat, bits, own.sum(0)).matrix,
    "moments of its channel": of_its_channel,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS["lite0"](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    expected, known = outputs(model, images[1]), moments(model, images[0][:SHOWN])
    rows: list[dict[str, Any]] = []
    for bits in WIDTHS:
        for name, way in WAYS.items():
            found = copy.deepcopy(model)
            for layer, module in kernels(found).items():
                rounded = way(module.weight.detach().flatten(1), bits, known[layer])
                module.weight.data = rounded.reshape(module.weight.shape).float()
            apart = divergence(outputs(found, images[1]), expected)
            rows.append({"bits": bits, "way": name, "divergence": round(apart, 5)})
            print(rows[-1], flush=True)
            args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


if __name__ == "__main__":
    main()
