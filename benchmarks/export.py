"""Exported files: bytes, logits, memory, load time and latency against the dense model's ONNX.

    python benchmarks/export.py

ViT-B/16 and ResNet50 of torchvision with random weights at 224 px, and a narrow model of each kind
at 32 px; schemes `tied`, `lors` at 50 % and a hybrid. Each is exported with every way to lower, and
run by ONNX Runtime, one thread, each form in a process of its own, in turns. Ratios are to dense
ONNX within each turn: median and the middle 80 %. Memory is the process's own (anonymous) memory
that the loaded model holds. The result is written after each model, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import tiedconv
from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands._reference import relative_difference
from tiedconv.exporters import Job, all_formats
from tiedconv.exporters._format import stored_bytes
from tiedconv.exporters.onnx import write_dense
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.tie import state_of, untie

RESULT = Path(__file__).parent / "results" / "export.json"
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit-narrow": ("timm:vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 32),
    "resnet-narrow": ("timm:resnet50", {"num_classes": 10, "stem_width": 16,
                                        "channels": [32, 64, 128, 256]}, 32),
    "vit_b_16": ("vit_b_16", {}, 224),
    "resnet50": ("resnet50", {}, 224),
}  # fmt: skip
SMALL = {"resnet50": 0.62, "resnet-narrow": 0.62}  # the least that `lors` can do there is 45 %
HYBRID = {
    "vit": Recipe((Rule("tied", {}, include=("*mlp*",)),
                   Rule("lors", {"rank": 32}, include=("*att*",)))),
    "resnet": Recipe((Rule("tied", {}, include=("*conv1*", "*conv3*")),
                      Rule("lors", {"rank": 32}, include=("*conv2*",)))),
}  # fmt: skip
WAYS = {
    "auto": ("auto", False), "never": ("never", False), "always": ("always", False),
    "always, one copy": ("always", True),
}  # fmt: skip


def compact(name: str, scheme: str) -> torch.nn.Module:
    """The tied model; a head of zeros, as torchvision makes it, would hide all differences."""
    model = converted(name, scheme).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if not tensor.any():
            tensor.data.normal_(std=0.05, generator=generator)
    return model


def converted(name: str, scheme: str) -> torch.nn.Module:
    """The model with random weights, tied."""
    spec, arguments, _ = MODELS[name]
    how: dict[str, Any] = {"model_args": arguments, "weights": "none"}
    if scheme == "hybrid":
        return tiedconv.convert(spec, recipe=HYBRID["vit" if "vit" in name else "resnet"], **how)
    if scheme == "lors":
        how["params"] = f"{100 * SMALL.get(name, 0.5):g}%"
    return tiedconv.convert(spec, scheme, **how)


def measure(name: str, scheme: str, batches: list[int], rounds: int, folder: Path) -> Any:
    """All figures of one model under one scheme."""
    side = MODELS[name][2]
    model = compact(name, scheme)
    plan = state_of(model).plan
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    stored = stored_bytes(model, "float32")
    dense = folder / "dense.onnx"
    write_dense(untie(copy.deepcopy(model)), images, dense)
    onnx = all_formats()["onnx"]
    ways: dict[str, Any] = {}
    for lower in ("auto", "never", "always"):
        job = Job(copy.deepcopy(model), images, folder, f"{lower}.onnx", lower=lower)
        written = onnx.write(job)
        found = onnx.run(job.path, images)
        assert found is not None
        ways[lower] = {
            "file_bytes": job.path.stat().st_size, "to_stored": job.path.stat().st_size / stored,
            "tensors_to_stored": written.weight_bytes / stored,
            "off": relative_difference(found, expected), "applied": written.facts["factored"],
            "made": written.facts["materialized"],
        }  # fmt: skip
    return {
        "parameters": plan.original, "stored": plan.stored, "stored_bytes": stored,
        "dense_bytes": dense.stat().st_size, "files": ways,
        "runs": turns(folder, side, batches, rounds),
    }  # fmt: skip


def turns(folder: Path, side: int, batches: list[int], rounds: int) -> dict[str, Any]:
    """Load time, memory and latency of each form, as shares of the dense one."""
    shape = (3, side, side)
    forms = {"dense": BenchTarget(str(folder / "dense.onnx"), "onnx", shape=shape)}
    for way, (lower, lean) in WAYS.items():
        file = str(folder / f"{lower}.onnx")
        forms[way] = BenchTarget(file, "onnx", lean=lean, shape=shape)
    processes = {way: Process(c) for way, c in forms.items()}
    try:
        loaded = {way: p.load() for way, p in processes.items()}
        found: dict[str, Any] = {
            way: {"load_seconds": s, "load_ratio": s / loaded["dense"][0], "held_bytes": b,
                  "held_ratio": b / loaded["dense"][1], "latency": {}}
            for way, (s, b) in loaded.items()
        }  # fmt: skip
        for batch in batches:
            for process in processes.values():
                process.run(batch)
            seconds: dict[str, list[float]] = {way: [] for way in processes}
            for _ in range(rounds):
                for way, process in processes.items():
                    seconds[way].append(process.run(batch))
            for way, own in seconds.items():
                ratios = sorted(a / b for a, b in zip(own, seconds["dense"], strict=True))
                edge = len(ratios) // 10
                found[way]["latency"][str(batch)] = {
                    "seconds": statistics.median(own), "ratio": statistics.median(ratios),
                    "low": ratios[edge], "high": ratios[-1 - edge],
                }  # fmt: skip
        return found
    finally:
        for process in processes.values():
            process.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--schemes", nargs="+", default=["tied", "lors", "hybrid"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    store = json.loads(args.result.read_text()) if args.result.is_file() else {"models": {}}
    import onnxruntime

    store["versions"] = {"torch": str(torch.__version__), "onnxruntime": onnxruntime.__version__}
    store["machine"], store["rounds"] = platform.machine(), args.rounds
    for name in args.only:
        for scheme in args.schemes:
            known = store["models"].setdefault(name, {})
            if scheme in known:
                continue
            with tempfile.TemporaryDirectory() as folder:
                known[scheme] = measure(name, scheme, args.batches, args.rounds, Path(folder))
            args.result.parent.mkdir(exist_ok=True)
            args.result.write_text(json.dumps(store, indent=1) + "\n")
            print(name, scheme, json.dumps(known[scheme]), flush=True)


if __name__ == "__main__":
    main()
