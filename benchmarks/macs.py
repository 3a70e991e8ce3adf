"""Accuracy and measured time against multiply-adds: `auto --macs` of a ViT trained by someone else.

    python benchmarks/macs.py --weights VIT.safetensors --data CIFAR10

The model is calibrated on 256 training images without labels, and judged on all test images. Time
is that of ONNX Runtime on one thread, in rounds that take the original and each compact model in
turn; the ratio is that of the medians. Multiply-adds are predicted by the plan. Results go to
`benchmarks/results/macs.json`, row by row; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import onnxruntime
import torch
from frontier import Images, judged, outputs, vit_real
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.exporters._onnx_lower import dense_graph, onnx_graph
from tiedconv.runtime.dequantize import dequantize
from tiedconv.runtime.tie import is_tied

RESULT = Path(__file__).parent / "results" / "macs.json"
IMAGES, ROUNDS, BATCHES = 256, 30, (1, 8)
ASKED = ({"macs": "70%"}, {"macs": "60%"}, {"macs": "50%"}, {"macs": "60%", "bytes": "10%"})


def converted(
    model: nn.Module, images: Images, effort: str, budget: Mapping[str, str]
) -> nn.Module:
    """The compact model of a budget."""
    data = TensorDataset(images[0], torch.zeros(len(images[0]), dtype=torch.int64))
    calib = Calibration(data, IMAGES, CalibConfig(effort=effort), "cpu", 0)
    return tiedconv.convert(model, "auto", calib=calib, **budget)


def session(model: nn.Module, example: Tensor) -> onnxruntime.InferenceSession:
    """Of a model's ONNX graph, dense or compact, on one thread."""
    inputs = {"images": example.expand(2, -1, -1, -1).contiguous()}
    if is_tied(model):  # in floats, so that time is that of the multiply-adds alone
        graph = onnx_graph(dequantize(copy.deepcopy(model)), inputs)[0]
    else:
        graph = dense_graph(model, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx_ir.save(graph, path)
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )  # fmt: skip


def ratios(
    dense: onnxruntime.InferenceSession, compact: onnxruntime.InferenceSession, example: Tensor
) -> dict[str, Any]:
    """Time of the compact model as a ratio to the dense one's, for each batch."""
    found: dict[str, Any] = {}
    for batch in BATCHES:
        feed = example.expand(batch, -1, -1, -1).contiguous().numpy()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for spent, one in zip(times, (dense, compact), strict=True):
                given = {one.get_inputs()[0].name: feed}
                one.run(None, given)  # the caches are this model's own now
                start = time.perf_counter()
                one.run(None, given)
                spent.append(time.perf_counter() - start)
        of_dense, of_compact = map(statistics.median, times)
        found[f"dense_ms_batch_{batch}"] = round(1000 * of_dense, 3)
        found[f"time_ratio_batch_{batch}"] = round(of_compact / of_dense, 3)
    return found


def main() -> None:
    """Make the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--efforts", nargs="*", default=["normal"])
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, images = vit_real(args)
    model.load_state_dict(load_file(args.weights))
    model.eval()
    images = (images[0][:IMAGES], images[1], images[2][:IMAGES], images[3])
    expected, example = outputs(model, images[1]), images[1][:1]
    dense = session(model, example)
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        print(row, flush=True)
        text = ",\n".join(json.dumps(r) for r in rows)
        args.result.write_text(f"[\n{text}\n]\n")

    if not rows:
        add({"method": "original", **judged(model, images, expected)})
    for effort in args.efforts:
        for budget in ASKED:
            key = {"method": "auto", "effort": effort, "asked": dict(budget)}
            if any(key.items() <= row.items() for row in rows):
                continue
            start = time.process_time()
            tied = converted(model, images, effort, budget)
            seconds = round(time.process_time() - start)
            report = tiedconv.report(tied)
            assert report.macs is not None
            share = report.macs["converted"] / report.macs["original"]
            facts = judged(tied, images, expected)
            add({
                **key, "macs": round(share, 4), "params": round(report.ratio, 4), **facts,
                **ratios(dense, session(tied, example), example), "seconds": seconds,
            })  # fmt: skip


if __name__ == "__main__":
    main()
