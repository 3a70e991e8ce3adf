"""Fewer hidden units (scheme narrow) beside low rank and pruning, after calibration alone.

    python benchmarks/narrow.py --model vit-real --weights VIT.safetensors --data CIFAR10
    python benchmarks/narrow.py --model resnet-narrow --weights RESNET.safetensors --data CIFAR10
    python benchmarks/narrow.py --model lite0 --weights LITE0.safetensors --data PHOTOS
    python benchmarks/narrow.py --times

Every method gets the same calibration images, without labels, and no training: 512 of CIFAR-10's
training images, or 256 photos of ImageNet. What is asked for are parameters, of Lite0
multiply-adds. torch-pruning, on CIFAR-10, ranks by gradients, for which it gets labels too. It is
asked for the multiply-adds that each of our models has, and its better form counts (uniform or
isomorphic, by the divergence on the calibration images). Multiply-adds are those that
`torch.utils.flop_counter` counts while a model runs: ours with narrow layers and low-rank factors
applied one by one. `--times` is of ViT-S/16 and ResNet50 with random weights, one thread, all forms
by turns: eager, and in ONNX Runtime. Results go to `benchmarks/results/narrow.json`, row by row;
rows that are there are not made again.
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
from finetuning import stored_parameters
from frontier import MODELS, Images, divergence, judged, outputs
from models import normalised, read_pixels
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
import torchvision  # noqa: E402

RESULT = Path(__file__).parent / "results" / "narrow.json"
ASKED = {
    "vit-real": {
        "narrow": (75, 60, 50), "narrow without heads": (75, 60), "lowrank": (75, 60, 50),
        "auto": (75, 60, 50),
    },
    # Without low rank: in PyTorch a convolution computes its weight, whatever its factors.
    "resnet-narrow": {"narrow": (75, 50)},
    "lite0": {"narrow": (90, 80), "lowrank": (90, 80), "auto": (90, 80)},
}  # fmt: skip
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "narrow without heads": ("narrow", {"include": ["*mlp*"]}),
}
"""Scheme and options of a method that is not a scheme by its defaults."""
LIMITED = {"lite0": "macs"}
"""What is asked for, where it is not parameters."""
PHOTOS = 256
"""Of ImageNet, to calibrate by."""
TIMED = {
    "vit-s": lambda: timm.create_model("vit_small_patch16_224"),
    "resnet50": lambda: torchvision.models.resnet50(weights=None),
}
ROUNDS = 15


@torch.no_grad()
def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Of one image, as the model runs."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(images[:1])
    return int(counter.get_total_flops()) // 2


def as_run(model: nn.Module, fewest: bool = False) -> nn.Module:
    """A tied model with narrow layers, its low-rank factors applied one by one.

    Args:
        model: tied.
        fewest: apply factors wherever that takes fewer multiply-adds, as `--macs` counts.
    """
    tiedconv.narrow_layers(model)
    tiedconv.apply_factors(model, cache=fewest)
    return model.eval()


def converted(
    model: nn.Module, calib: Tensor, method: str, limit: dict[str, str], effort: str
) -> nn.Module:
    """Ours, calibrated."""
    scheme, options = OPTIONS.get(method, (method, {}))
    shown = TensorDataset(calib, torch.zeros(len(calib), dtype=torch.int64))
    how = Calibration(shown, images=len(calib), config=CalibConfig(effort=effort), workers=0)
    tied = tiedconv.convert(copy.deepcopy(model), scheme, calib=how, **limit, **options)
    return as_run(tied, fewest="macs" in limit)


def pruned(
    model: nn.Module, labelled: tuple[Tensor, Tensor], calib: Tensor, wanted: int
) -> nn.Module:  # fmt: skip
    """By torch-pruning, with at most so many multiply-adds; the better of two forms.

    Args:
        model: the original.
        labelled: images and their labels, to rank channels by gradients.
        calib: images that decide between the forms, by the divergence.
        wanted: multiply-adds of one image.
    """
    expected, found = outputs(model, calib), []
    grads = baselines.gradients(model, *labelled, batch=256 if calib.shape[-1] < 100 else 32)
    for variant in ("uniform", "isomorphic"):
        least, most, best = 0.02, 1.0, None
        for _ in range(9):
            share = (least + most) / 2
            made = baselines.pruned_to(model, grads, calib[:2], share, variant)
            if multiply_adds(made, calib) <= wanted:
                least, best = share, made
            else:
                most = share
        if best is not None:
            found.append(best)
    return min(found, key=lambda made: divergence(outputs(made, calib), expected))


def labelled_images(name: str, images: Images, data: Path) -> tuple[Tensor, Tensor]:
    """What torch-pruning gets to rank channels by: 512 images of CIFAR-10, or the photos."""
    if name == "lite0":
        return images[0], images[2]
    some = read_pixels(data)["train"].some(512)
    return normalised(some.images), some.labels


def accuracy(args: argparse.Namespace, add: Callable[[dict[str, Any]], None], rows: Any) -> None:
    """Rows of one model."""
    model, images = MODELS[args.model](args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    of = LIMITED.get(args.model, "params")
    calib = images[0][:PHOTOS] if args.model == "lite0" else images[0]
    expected = outputs(model, images[1])
    labelled = None
    if of == "params" and not args.alone:
        labelled = labelled_images(args.model, images, args.data)
    whole = multiply_adds(model, calib)

    def row(method: str, asked: int, effort: str, make: Callable[[], nn.Module]) -> int:
        key = {"model": args.model, "method": method, "asked": asked, "effort": effort}
        done = next((r for r in rows if key.items() <= r.items()), None)
        if done is None:
            start = time.time()
            found = make()
            stored = stored_parameters(found)
            done = {
                **key, "parameters": stored / stored_parameters(model),
                "multiply_adds": multiply_adds(found, calib) / whole,
                **judged(found, images, expected), "seconds": round(time.time() - start),
            }  # fmt: skip
            add(done)
        return int(done["multiply_adds"] * whole)

    row("original", 100, "", lambda: model)
    for effort in args.efforts:
        for scheme, sizes in ASKED[args.model].items():
            for asked in sizes:
                ours = partial(converted, model, calib, scheme, {of: f"{asked}%"}, effort)
                macs = row(scheme, asked, effort, ours)
                if effort == "fast" and labelled is not None:
                    method = f"torch-pruning as {scheme}"
                    row(method, asked, "", partial(pruned, model, labelled, calib, macs))


def milliseconds(forms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least time of each form of many, all by turns, in milliseconds."""
    found = dict.fromkeys(forms, float("inf"))
    for _ in range(ROUNDS):
        for name, run in forms.items():
            start = time.perf_counter()
            run()
            found[name] = min(found[name], 1000 * (time.perf_counter() - start))
    return found


@torch.no_grad()
def times(add: Callable[[dict[str, Any]], None]) -> None:
    """Rows of the time that forms of equal multiply-adds take."""
    import onnxruntime as ort

    torch.set_num_threads(1)
    for name, build in TIMED.items():
        torch.manual_seed(0)
        dense = build().eval()
        x = torch.randn(8, 3, 224, 224)
        models = {"dense": dense}
        narrow = tiedconv.convert(copy.deepcopy(dense), "narrow", width=0.5)
        share = tiedconv.report(narrow).stored / tiedconv.report(narrow).original
        models["narrow"] = tiedconv.untie(narrow)
        low = tiedconv.convert(copy.deepcopy(dense), "lowrank", params=f"{100 * share:.1f}%")
        tiedconv.apply_factors(low)
        models["lowrank"] = low.eval()
        eager = milliseconds({n: partial(m, x) for n, m in models.items()})
        sessions = {}
        with tempfile.TemporaryDirectory() as folder:
            for form in ("dense", "narrow", "lowrank"):
                sessions[form] = _session(models[form], x, Path(folder) / f"{form}.onnx", ort)
            given = {"images": x.numpy()}
            onnx = milliseconds({n: partial(s.run, None, given) for n, s in sessions.items()})
        for form, model in models.items():
            add({
                "model": name, "method": form, "images": len(x), "threads": 1,
                "multiply_adds": multiply_adds(model, x) / multiply_adds(dense, x),
                "eager_ms": round(eager[form], 1), "onnx_ms": round(onnx[form], 1),
            })  # fmt: skip


def _session(model: nn.Module, x: Tensor, path: Path, ort: Any) -> Any:
    import onnx_ir as ir

    from tiedconv.exporters._onnx_lower import onnx_graph
    from tiedconv.exporters.onnx import write_dense
    from tiedconv.runtime.tie import is_tied

    if is_tied(model):
        ir.save(onnx_graph(copy.deepcopy(model), {"images": x[:2]})[0], path)
    else:
        write_dense(model, {"images": x[:2]}, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(ASKED))
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--efforts", nargs="*", default=["fast", "normal"])
    parser.add_argument("--times", action="store_true")
    parser.add_argument("--alone", action="store_true", help="without torch-pruning")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        args.result.write_text(json.dumps(rows, indent=1) + "\n")

    if args.model:
        accuracy(args, add, rows)
    if args.times:
        times(add)


if __name__ == "__main__":
    main()
