"""Memory that converting a checkpoint larger than the memory takes.

Makes a checkpoint of random weights, tensor by tensor, and converts it by the command, each scheme
in a process of its own. The folder of --temp needs space for the checkpoint, the result, and about
the checkpoint's size once more. Linux only, as the figures come from /proc.

    python benchmarks/streaming.py --temp /var/tmp
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "streaming.json"
CASES = {
    "tied": ["--scheme", "tied"],
    "lors": ["--scheme", "lors"],
    "tied, 50 %": ["--scheme", "tied", "--params", "50%"],
    "lors, 50 %": ["--scheme", "lors", "--params", "50%"],
}
IMPORTS = "import {module}; print(open('/proc/self/status').read())"
FIELDS = {"peak_rss": "VmHWM", "rss_anon": "RssAnon", "rss_file": "RssFile"}


def encoder(width: int = 1024, depth: int = 80) -> nn.Module:
    """The encoder of a ViT: `depth` layers of `12 width^2` numbers."""
    layer = nn.TransformerEncoderLayer(
        width, width // 64, 4 * width, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=80)
    parser.add_argument("--cases", default="tied;lors", help=f"of {'; '.join(CASES)}")
    parser.add_argument("--temp", type=Path, help="where the files lie")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "width": args.width,
        "depth": args.depth,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "imports": {
            module: status_of(["-c", IMPORTS.format(module=module)])
            for module in ("torch", "tiedconv", "tiedconv.cli")
        },
        "rows": [],
    }
    print(record, flush=True)
    with tempfile.TemporaryDirectory(dir=args.temp) as folder:
        weights = Path(folder, "dense.safetensors")
        make_dense(weights, args.width, args.depth)
        record["dense_bytes"] = weights.stat().st_size
        for name in args.cases.split(";"):
            output = Path(folder, "out.safetensors")
            row = {"case": name, **convert(CASES[name], weights, output, args.width, args.depth)}
            output.unlink()
            record["rows"].append(row)
            print(row, flush=True)
            args.result.write_text(json.dumps(record, indent=1) + "\n")


def make_dense(path: Path, width: int, depth: int) -> None:
    """A checkpoint of random weights, never in memory as a whole."""
    from tiedconv.io.safetensors_file import write_tensors
    from tiedconv.sources.init import skip_memory

    with skip_memory():
        model = encoder(width, depth)
    forms = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str) -> Tensor:
        return torch.randn(forms[name][1], generator=generator) * 0.02

    write_tensors(path, forms, draw, {"format": "pt"})


def convert(options: list[str], weights: Path, output: Path, width: int, depth: int) -> Any:
    """Run the command, and watch its memory and its temporary files."""
    line = [
        sys.executable, "-m", "tiedconv", "convert", "streaming:encoder", *options,
        "--model-arg", f"width={width}", "--model-arg", f"depth={depth}",
        "--weights", str(weights), "-o", str(output), "--json",
    ]  # fmt: skip
    peaks = dict.fromkeys([*FIELDS, "scratch_bytes"], 0)
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(line, cwd=Path(__file__).parent, stdout=output)
        while process.poll() is None:
            for key, value in watched(process.pid).items():
                peaks[key] = max(peaks[key], value)
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        assert process.returncode == 0
        output.seek(0)
        result = json.load(output)
    return {
        "seconds": round(seconds, 1),
        **peaks,
        "output_bytes": result["file_bytes"],
        "ratio": round(result["ratio"], 4),
    }


def watched(pid: int) -> dict[str, int]:
    """Memory of a process, and what files without a name it has open, in bytes."""
    try:
        figures = memory_of(Path(f"/proc/{pid}/status").read_text())
        files = {}
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if "(deleted)" in os.readlink(link):
                stat = link.stat()
                files[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
        return {**figures, "scratch_bytes": sum(files.values())}
    except (OSError, KeyError):  # it has just ended, or closed a file
        return {}


def memory_of(status: str) -> dict[str, int]:
    """The figures of a /proc/PID/status, in bytes."""
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", status, re.MULTILINE))
    return {key: int(found[field]) * 1024 for key, field in FIELDS.items()}


def status_of(arguments: list[str]) -> dict[str, int]:
    """Memory of a Python process that prints its status at its end."""
    line = [sys.executable, *arguments]
    return memory_of(subprocess.run(line, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
