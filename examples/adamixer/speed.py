"""Time and memory of the full-size decoder's forward, with LORS against without.

    python examples/adamixer/speed.py [--rounds 15] [--threads 1]

One image, random maps of it. Contenders take turns in one process, each turn in a new order; CPU
time is measured, and a ratio is taken within each turn, so that a machine whose speed drifts still
gives a fair figure. Peak memory is that of a process for each, from before the decoder is built.
Results go to `benchmarks/results/adamixer_speed.json`.

`stock` is AdaMixer, `wide` the same with LORS' in_points and groups, `lors` is `wide` converted.
It makes the projection's weights in each forward; `applied` never makes them, by
`tiedconv.apply_factors`, and `frozen` caches all that it can, for memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # this folder is the package `adamixer`

import tiedconv
from adamixer.conversion import recipe_for, reset_lors
from adamixer.decoder import Decoder, Queries
from adamixer.settings import LORS, STOCK, Setting

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "adamixer_speed.json"
NAMES = ("stock", "wide", "lors", "applied", "frozen")
DENSE = ("stock", "wide")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", type=int, nargs="+", default=[320, 640], help="of the image")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak(args.memory_of[0], Path(args.memory_of[1]), args.sizes[0]))
        return
    record: dict[str, Any] = {
        "torch": str(torch.__version__), "threads": args.threads, "rounds": args.rounds,
        "measure": "CPU time of a forward of one image, ratio to stock, median (quartiles)",
        "forward": {size: times(size, args.rounds) for size in args.sizes},
        "peak_bytes": memory(args.sizes[0]),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    args.result.parent.mkdir(exist_ok=True, parents=True)
    args.result.write_text(json.dumps(record, indent=1) + "\n")


def candidate(name: str) -> Decoder:
    """A decoder by name, in evaluation mode."""
    torch.manual_seed(0)
    made = Decoder(STOCK if name == "stock" else LORS)
    return prepared(name, made if name in DENSE else converted(made))


def prepared(name: str, decoder: Decoder) -> Decoder:
    """In evaluation mode, run as the name says."""
    decoder.eval()
    if name == "frozen":
        tiedconv.freeze(decoder)
    if name == "applied":
        tiedconv.apply_factors(decoder, rows=decoder.setting.queries)
    return decoder


def converted(dense: Decoder) -> Decoder:
    """With LORS; values don't matter here, so none are fitted."""
    made = tiedconv.convert(dense, recipe=recipe_for(scratch=True), inplace=True)
    reset_lors(made)
    assert isinstance(made, Decoder)
    return made


def inputs(setting: Setting, size: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Random maps of one square image, and the first queries."""
    torch.manual_seed(1)
    maps = [torch.randn(1, setting.width, size // s, size // s) for s in setting.strides]
    content, xyzr = Queries(setting)(1, size, size)
    return maps, content.detach(), xyzr


@torch.no_grad()
def seconds(decoder: Decoder, size: int) -> float:
    """CPU time of one forward."""
    given = inputs(decoder.setting, size)
    start = time.process_time()
    decoder(*given)
    return time.process_time() - start


def times(size: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median time of each candidate and its ratio to stock, with quartiles."""
    decoders = {name: candidate(name) for name in NAMES}
    turns: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        order = random.sample(NAMES, len(NAMES))
        turns.append({name: seconds(decoders[name], size) for name in order})
    turns = turns[1:]  # the first warms up
    found = {}
    for name in NAMES:
        ratios = [turn[name] / turn["stock"] for turn in turns]
        low, middle, high = statistics.quantiles(ratios, n=4)
        taken = statistics.median(turn[name] for turn in turns)
        found[name] = {
            "seconds": round(taken, 4), "ratio": round(middle, 3),
            "low": round(low, 3), "high": round(high, 3),
        }  # fmt: skip
    return found


def memory(size: int) -> dict[str, int]:
    """Peak memory of each candidate, loaded from a file in a process of its own, in bytes.

    From a file, since a conversion has the dense weights in memory too.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in NAMES[:3]}
        for name, file in files.items():
            decoder = candidate(name)
            if name == "lors":
                tiedconv.save(decoder, file)
            else:
                save_file(decoder.state_dict(), file)
        files["applied"] = files["frozen"] = files["lors"]
        return {name: _peak_apart(name, file, size) for name, file in files.items()}


def _peak_apart(name: str, file: Path, size: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name, str(file), "--sizes", str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout)


def peak(name: str, file: Path, size: int) -> int:
    """What loading a decoder and one forward add to the most memory this process has held."""
    with torch.device("meta"):  # no memory before the file's tensors take their places
        skeleton = Decoder(STOCK if name == "stock" else LORS)
    before = _most_resident()
    if name in DENSE:
        skeleton.load_state_dict(load_file(file), assign=True)
        decoder = skeleton
    else:
        decoder = tiedconv.load(file, model=skeleton)
    seconds(prepared(name, decoder), size)
    return _most_resident() - before


def _most_resident() -> int:
    """Bytes, as Linux tells them; getrusage would begin with those of the parent process."""
    status = Path("/proc/self/status").read_text("utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
