"""Quantisers of other packages on the models of `frontier.py`: NNCF (OpenVINO) and torchao.

    pip install torch==2.13.0 torchvision==0.28.0 timm transformers nncf openvino torchao
    python benchmarks/frontier_packages.py --model vit-real --weights VIT.safetensors --data CIFAR10

The same calibration images, judged on the same others. NNCF compresses the weights of the OpenVINO
form: INT8, and INT4 in groups (a row, 128, 64, 32), to nearest, with scale estimation, or by its
GPTQ, where it offers them; its convolutions have 8 bits at least. The size is that of the `.bin`
file alone, with all that is not compressed in float16, which leaves out the graph (`.xml`).
torchao quantises linear layers alone (`IntxWeightOnlyConfig`, 2 to 8 bits, a row or groups); it
keeps a byte for each code, so its size is counted as if codes were packed and the rest float16.
Rows go to `benchmarks/results/frontier.json`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from frontier import MODELS, RESULT, Images, divergence, judged, outputs
from safetensors.torch import load_file
from torch import Tensor, nn

Config = dict[str, Any]


class Compiled(nn.Module):
    """An OpenVINO model, run as the torch model was."""

    def __init__(self, model: Any, named: bool) -> None:
        super().__init__()
        import openvino as ov

        self._run = ov.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._named = named

    def forward(self, images: Tensor) -> Any:
        found = torch.from_numpy(self._run(images.numpy())[0])
        return {"last_hidden_state": found} if self._named else found


def nncf_forms(model: nn.Module, images: Images, named: bool) -> Iterator[tuple[Config, Any, int]]:
    """Every setting of NNCF: what it is, the model, and the bytes of its weights."""
    import nncf
    import openvino as ov

    mode = nncf.CompressWeightsMode
    shown = [images[0][i : i + 16] for i in range(0, min(256, len(images[0])), 16)]
    settings: list[Config] = [{"mode": mode.INT8_SYM}]
    for group in (-1, 128, 64, 32):
        base: Config = {
            "mode": mode.INT4_SYM,
            "group_size": group,
            "ratio": 1.0,
            "all_layers": True,
        }
        settings += [base, {**base, "scale_estimation": True}, {**base, "gptq": True}]
    for setting in settings:
        form = ov.convert_model(model, example_input=images[0][:2])
        aware = any(setting.get(key) for key in ("scale_estimation", "gptq"))
        how: Config = {"dataset": nncf.Dataset([{0: s.numpy()} for s in shown])} if aware else {}
        try:
            found = nncf.compress_weights(form, **setting, **how)
            ready = Compiled(found, named)
            with tempfile.TemporaryDirectory() as folder:
                ov.save_model(found, Path(folder) / "m.xml", compress_to_fp16=True)
                size = (Path(folder) / "m.bin").stat().st_size
        except Exception as error:  # what a release does not offer for this model
            print("nncf", setting, type(error).__name__, str(error)[:100], flush=True)
            continue
        facts = {k: v for k, v in setting.items() if k in ("scale_estimation", "gptq")}
        bits = 8 if setting["mode"] == mode.INT8_SYM else 4
        group = max(0, setting.get("group_size", 0))
        yield {"bits": bits, "group": group, **facts}, ready, size


def torchao_forms(
    model: nn.Module, images: Images, named: bool
) -> Iterator[tuple[Config, Any, int]]:
    """Every width and group of torchao's weight-only integers."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    for bits in (2, 3, 4, 5, 6, 8):
        for group in (0, 128, 64, 32):
            found = copy.deepcopy(model)
            try:
                granularity = PerGroup(group) if group else PerAxis(0)
                kind = getattr(torch, f"int{bits}")
                quantize_(found, IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity))
                with torch.no_grad():
                    found(images[0][:2])
            except Exception as error:  # a group that does not divide a width
                print("torchao", bits, group, type(error).__name__, str(error)[:100], flush=True)
                continue
            yield {"bits": bits, "group": group}, found, packed_size(model, bits, group)


def packed_size(model: nn.Module, bits: int, group: int) -> int:
    """Bytes with linear layers in packed codes and float16 scales, all else float16."""
    total = 2 * sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            scales = rows * -(-columns // (group or columns))
            total += rows * columns * bits // 8 + 2 * scales - 2 * rows * columns
    return total


PACKAGES: dict[str, Callable[..., Iterator[tuple[Config, Any, int]]]] = {
    "nncf": nncf_forms, "torchao": torchao_forms,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--packages", nargs="*", choices=PACKAGES, default=[*PACKAGES])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    model, images = MODELS[args.model](args)
    named = args.model == "dinov2"
    if not named:
        model.load_state_dict(load_file(args.weights))
    model.eval()
    dense = 4 * sum(t.numel() for t in model.state_dict().values())
    expected, targets = outputs(model, images[1]), outputs(model, images[0])
    rows: list[Config] = json.loads(args.result.read_text()) if args.result.exists() else []
    rows = [r for r in rows if r["model"] != args.model or r["method"] not in args.packages]
    for package in args.packages:
        start = time.process_time()
        for facts, found, size in PACKAGES[package](model, images, named):
            rows.append({
                "model": args.model, "method": package, **facts, "bytes": size,
                "percent": round(100 * size / dense, 2),
                "calibration": round(divergence(outputs(found, images[0]), targets), 6),
                **judged(found, images, expected),
                "seconds": round(time.process_time() - start),
            })  # fmt: skip
            start = time.process_time()
            print(rows[-1], flush=True)
            text = ",\n".join(json.dumps(r) for r in rows)
            args.result.write_text(f"[\n{text}\n]\n")


if __name__ == "__main__":
    main()
