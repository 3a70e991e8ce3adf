"""Files with integers: bytes, memory and time, of the compact file and of its exports.

    python benchmarks/packed.py --dinov2 FOLDER --lite0 LITE0.safetensors --photos PHOTOS

ViT-S/14 (112 px) and EfficientNet-Lite0 (224 px), `auto --bytes` with and without `--bits 4`,
calibrated with 64 photos (`fast`). Of each file: its bytes against those of its tensors, the ONNX
and OpenVINO file against the packed tensors in memory, how far their outputs are from ours, and
`bench`: memory that the loaded model holds and time of a forward pass, each against the dense
float32 model in the same runtime, in turns. ONNX Runtime multiplies by packed integers as it does
by default (activations in 8 bits meanwhile), but outputs are compared in float32. The result is
written after each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import struct
import tempfile
from pathlib import Path
from typing import Any

import tiedconv
from tiedconv.calibration.config import CalibConfig
from tiedconv.commands.bench import bench
from tiedconv.commands.convert_file import convert_file
from tiedconv.conversion.calibrate import Calibration
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import Preprocess

RESULT = Path(__file__).parent / "results" / "packed.json"
SIZES = {"dinov2": ("12%", 112), "lite0": ("20%", 224)}
MEANWHILE = {"dinov2": "25%", "lite0": "25%"}  # with at most 4 bits, the most that it may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dinov2", type=Path)
    parser.add_argument("--lite0", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sizes-alone", action="store_true", help="of rows that are there")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(args.result.read_text()) if args.result.exists() else []
    for name, bits in itertools.product(("dinov2", "lite0"), (None, "4")):
        known = [r for r in rows if r["model"] == name and r["bits"] == bits]
        if getattr(args, name) is None or bool(known) != args.sizes_alone:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = measured(args, name, bits, Path(folder))
        if known:
            known[0].update(found)
        else:
            rows.append({"model": name, "bits": bits, **found})
        args.result.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(name, bits, json.dumps(found, indent=1), flush=True)


def measured(args: argparse.Namespace, name: str, bits: str | None, folder: Path) -> dict[str, Any]:
    """All figures of one file."""
    percent, side = SIZES[name] if bits is None else (MEANWHILE[name], SIZES[name][1])
    spec, weights = (
        (f"hf:{args.dinov2}", "default") if name == "dinov2"
        else ("timm:tf_efficientnet_lite0", args.lite0)
    )  # fmt: skip
    calib = Calibration(args.photos, args.images, CalibConfig(effort="fast"), workers=0)
    path = folder / "compact.safetensors"

    def sized(wanted: Preprocess) -> Preprocess:
        return dataclasses.replace(wanted, size=side, resize=round(side / 0.875))

    recipe = Recipe.of("auto", bytes=percent, bits=bits)
    convert_file(spec, recipe, path, weights=weights, calib=calib, preprocess=sized)
    report = tiedconv.report(path)
    header = struct.unpack("<Q", path.read_bytes()[:8])[0]
    payload = path.stat().st_size - 8 - header
    exports = exported(path, report.memory_bytes, folder)
    if args.sizes_alone:
        return {"exports": exports}
    times = bench(
        path, runtimes=("eager", "onnx", "openvino"), batches=args.batches, rounds=args.rounds
    )  # fmt: skip
    return {
        "asked": percent, "file_bytes": path.stat().st_size,
        "to_payload": path.stat().st_size / payload, "packed_bytes": report.memory_bytes,
        "exports": exports, "processor": times.device,
        "machine": platform.machine(), "rounds": args.rounds,
        "rows": [dataclasses.asdict(row) for row in times.rows],
    }  # fmt: skip


def exported(path: Path, packed: int, folder: Path) -> dict[str, Any]:
    """Sizes of the exports of a file, against its packed tensors, and how far outputs are off."""
    exports = {}
    for kind in ("onnx", "openvino"):
        target = folder / f"m.{'onnx' if kind == 'onnx' else 'xml'}"
        found = tiedconv.export(path, target, kind)
        exports[kind] = {
            "bytes": found.size, "to_packed": found.size / packed,
            "to_file": found.size / path.stat().st_size, "off": found.difference,
        }  # fmt: skip
        for file in folder.glob(f"{target.stem}.*"):
            file.unlink()
    return exports


if __name__ == "__main__":
    main()
