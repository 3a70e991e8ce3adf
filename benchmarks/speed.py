"""Time of tied models against dense ones: forward, training step, frozen inference.

    python benchmarks/speed.py [--rounds 9] [--threads 2]

Dense and tied steps take turns in one process; CPU time (of all threads) is measured, and the
ratio is taken pair by pair, so that a machine whose speed drifts still gives a fair figure.
Results go to `benchmarks/results/speed.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiedconv
from tiedconv.sources import open_source

RESULT = Path(__file__).parent / "results" / "speed.json"
CASES = (
    ("resnet50", "tied", {}, 8),
    ("vit_b_16", "tied", {}, 8),
    ("vit_b_16", "lors", {"rank": 64}, 8),
    ("resnet50", "lors", {"rank": 64}, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = json.loads(args.result.read_text())["rows"] if args.result.is_file() else []
    for i in args.cases:
        spec, scheme, options, batch = CASES[i]
        rows = [
            r for r in rows
            if (r["model"], r["scheme"], r["options"], r["batch"]) != CASES[i]
        ]  # fmt: skip
        rows += case(spec, scheme, options, batch, args.rounds)
        for row in rows[-3:]:
            print(
                f"{spec:9} {scheme:5} {options!s:58} {row['what']:14} {row['ratio']:.3f} "
                f"({row['low']:.3f} to {row['high']:.3f})",
                flush=True,
            )
    record = {
        "torch": str(torch.__version__), "threads": args.threads, "rounds": args.rounds,
        "measure": "CPU time, tied / dense, median of pairs (quartiles)", "rows": rows,
    }  # fmt: skip
    args.result.parent.mkdir(exist_ok=True)
    args.result.write_text(json.dumps(record, indent=1) + "\n")


def case(
    spec: str, scheme: str, options: dict[str, Any], batch: int, rounds: int
) -> list[dict[str, Any]]:
    """Forward, training step and frozen inference of one conversion."""
    dense, _ = open_source(spec, {}, "none")
    tied = tiedconv.convert(dense, scheme, **options)
    images = torch.randn(batch, 3, 224, 224)
    labels = torch.randint(0, 1000, (batch,))
    rows = []

    def add(what: str, a: Callable[[], None], b: Callable[[], None]) -> None:
        figures = interleaved(a, b, rounds)
        rows.append(
            {"model": spec, "scheme": scheme, "options": options, "batch": batch, "what": what}
            | figures
        )

    add("training step", step(tied, images, labels), step(dense, images, labels))
    dense.eval(), tied.eval()
    add("forward", forward(tied, images), forward(dense, images))
    tiedconv.freeze(tied)
    add("frozen forward", forward(tied, images), forward(dense, images))
    return rows


def interleaved(a: Callable[[], None], b: Callable[[], None], rounds: int) -> dict[str, float]:
    """CPU time of a over that of b, pair by pair, the order of each pair swapped by turns."""
    a(), b()
    ratios = []
    for i in range(rounds):
        times = {}
        for work in (a, b) if i % 2 == 0 else (b, a):
            start = time.process_time()
            work()
            times[work] = time.process_time() - start
        ratios.append(times[a] / times[b])
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"ratio": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def forward(model: nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def work() -> None:
        with torch.no_grad():
            model(images)

    return work


def step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    model.train()

    def work() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return work


if __name__ == "__main__":
    main()
