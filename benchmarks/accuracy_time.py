"""Accuracy against measured time: what `tiedconv` makes of a model, and torch-pruning.

    pip install -r benchmarks/accuracy_requirements.txt
    python benchmarks/accuracy_time.py --weights VIT.safetensors --data CIFAR10
    python benchmarks/accuracy_time.py --model resnet-narrow --weights R.safetensors --data CIFAR10
    python benchmarks/accuracy_time.py --model dinov2 --weights FOLDER --data PHOTOS --steps 0

The models, the images that each method gets, and its training are those of `macs_trained.py`:
`auto --macs`, the schemes `lowrank` and `narrow` alone, and torch-pruning at the multiply-adds that
`auto` has. Each is judged after calibration, and after `--steps` of training with one seed, which
does not change the time. Of ViT-S/14 (`dinov2`) the cosine of the class token counts; it has no
labels, so neither torch-pruning nor training. Time is a ratio to the original's, in ONNX Runtime,
OpenVINO, eager PyTorch (after `tiedconv.optimize`) and with `torch.compile`: the original and the
form run in turn, the ratio is taken in each round, its median and middle 80 % are kept.
Multiply-adds are those that `torch.utils.flop_counter` counts while a model runs. Results go to
`benchmarks/results/accuracy_time.json`, row by row; rows that are there are not made again.
`scripts/accuracy_time_picture.py` draws them. With `--forms FOLDER --runtimes` forms are made and
judged, and nothing is timed: times are to be measured on a machine that does nothing else.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from frontier import judged, outputs
from macs_trained import RATES, Bench, counted, parser_of
from torch import Tensor, nn

import tiedconv
from tiedconv.errors import BudgetError
from tiedconv.runtime.stopwatch import seconds
from tiedconv.runtime.tie import is_tied
from tiedconv.timing import choose_runtime
from tiedconv.timing.runtimes import Run
from tiedconv.timing.table import processor

RESULT = Path(__file__).parent / "results" / "accuracy_time.json"
METHODS = ("auto", "lowrank", "narrow", "torch-pruning")
RUNTIMES = ("onnx", "openvino", "torch", "compiled")
ASKED = (85, 75, 60, 50, 40)
ROUNDS = 40


def ready(model: nn.Module, x: Tensor, runtime: str, threads: int, folder: Path) -> Run:
    """A run of a model, tied or plain, in a runtime."""
    torch.set_num_threads(threads)
    given, made = ((x,), {}), copy.deepcopy(model)
    chosen = choose_runtime("torch" if runtime == "compiled" else runtime)
    if runtime == "compiled":
        if is_tied(made):
            made = tiedconv.optimize(made, example=x)
        # Else torch takes the second model's sizes for changing ones of the first.
        made.compile(dynamic=False)
        return chosen.model(made, given, folder, threads)
    run = chosen.tied if is_tied(made) else chosen.model
    return run(made, given, folder, threads)


def time_ratio(
    model: nn.Module, dense: nn.Module, x: Tensor, runtime: str, threads: int, rounds: int
) -> dict[str, float]:
    """A model's time as a ratio to the original's, both in turn."""
    with tempfile.TemporaryDirectory() as folder:
        both = []
        for i, each in enumerate((dense, model)):
            place = Path(folder) / str(i)
            place.mkdir()
            both.append(ready(each.eval(), x, runtime, threads, place))
        for run in both:
            seconds(run, 3)
        count = max(1, round(0.01 / seconds(both[0], 1)))
        times = [[seconds(run, count) for run in both] for _ in range(rounds)]
    found = sorted(own / whole for whole, own in times)
    edge = len(found) // 10
    return {
        "ratio": round(statistics.median(found), 4),
        "low": round(found[edge], 4),
        "high": round(found[-1 - edge], 4),
        "dense_ms": round(1000 * statistics.median(whole for whole, _ in times), 3),
    }


class Forms:
    """The forms of a model, made when they are asked for.

    Args:
        bench: the model and its images.
        folder: that keeps forms from run to run; None to keep none.
    """

    def __init__(self, bench: Bench, folder: Path | None) -> None:
        self._bench, self._made = bench, dict[tuple[str, int], nn.Module | None]()
        self._folder = folder

    def of(self, method: str, asked: int) -> nn.Module | None:
        """One form; None where the scheme can't reach the multiply-adds."""
        key = method, asked
        if key not in self._made:
            self._made = {k: m for k, m in self._made.items() if k[1] == asked}
            self._made[key] = self._kept(method, asked)
        return self._made[key]

    def _kept(self, method: str, asked: int) -> nn.Module | None:
        if self._folder is None:
            return self._make(method, asked)
        path = self._folder / f"{self._bench.name}-{method}-{asked}.pt"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(self._make(method, asked), path)
        found: nn.Module | None = torch.load(path, weights_only=False)  # made here
        return found

    def _make(self, method: str, asked: int) -> nn.Module | None:
        if method == "torch-pruning":
            ours = self.of("auto", asked)
            assert ours is not None
            return self._bench.pruned(counted(ours, self._bench.images[0]))
        try:
            return self._bench.converted(method, macs=f"{asked}%")
        except BudgetError:
            return None


def main() -> None:
    """Make the rows that are missing."""
    models = ("vit-real", "resnet-narrow", "lite0", "dinov2")
    parser = parser_of(__doc__.splitlines()[0], models)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--asked", nargs="+", type=int, default=list(ASKED))
    parser.add_argument("--runtimes", nargs="*", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of training; 0 for none")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--forms", type=Path, help="keep forms here, for another run to time")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.model == "dinov2":
        args.methods = [method for method in args.methods if method != "torch-pruning"]
        if args.steps:
            parser.error("dinov2 has no labels: --steps 0")
    bench = Bench.of(args)
    images = bench.images
    whole, expected = counted(bench.model, images[0]), outputs(bench.model, images[1])
    kept = json.loads(args.result.read_text()) if args.result.exists() else {"rows": []}
    kept["processor"] = processor()

    def add(row: dict[str, Any]) -> None:
        kept["rows"].append(row)
        print(row, flush=True)
        text = ",\n  ".join(json.dumps(each) for each in kept["rows"])
        head = json.dumps(kept["processor"])
        args.result.write_text(f'{{\n "processor": {head},\n "rows": [\n  {text}\n ]\n}}\n')

    def missing(key: dict[str, Any]) -> bool:
        return not any(key.items() <= row.items() for row in kept["rows"])

    if missing({"model": args.model, "method": "original"}):
        add({"model": args.model, "method": "original", **judged(bench.model, images, expected)})
    forms = Forms(bench, args.forms)
    for asked, method in itertools.product(args.asked, args.methods):
        about = {"model": args.model, "method": method, "asked": asked}
        for steps in dict.fromkeys((0, args.steps)):
            if not missing({**about, "steps": steps}):
                continue
            if (made := forms.of(method, asked)) is None:
                add({**about, "steps": steps, "refused": True})
                continue
            facts = {"steps": steps, "macs": round(counted(made, images[0]) / whole, 4)}
            if steps:
                rates = (None, *RATES) if method == "torch-pruning" else (None,)
                made = bench.trained(made, steps, 0, rates)[0]
            add({**about, **facts, **judged(made, images, expected)})
        for runtime, batch, threads in itertools.product(
            args.runtimes, args.batches, args.threads
        ):  # fmt: skip
            timed = {**about, "on": runtime, "batch": batch, "threads": threads}
            if not missing(timed) or (made := forms.of(method, asked)) is None:
                continue
            found = time_ratio(
                made, bench.model, images[1][:batch], runtime, threads, args.rounds
            )  # fmt: skip
            add({**timed, **found, "load": round(os.getloadavg()[0], 1)})


if __name__ == "__main__":
    main()
