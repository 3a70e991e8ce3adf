"""Whether a change made conversion or training slower: two checkouts, by turns, in one run.

    git worktree add ../before COMMIT
    python benchmarks/against.py ../before [--rounds 5]

Each measurement is a process of its own with one of the two checkouts on its path: the conversions
of `conversion.py` (vit_b_16, dense file in, compact file out), `tiedconv plan`, and the steps of
training of a tied model. Processor seconds are compared, as waiting for a busy machine does not
count in them; ratios are taken within a round. Results go to `benchmarks/results/against.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from conversion import CASES, CONVERT, make_dense

RESULT = Path(__file__).parent / "results" / "against.json"
HERE = Path(__file__).parent.parent

CLOCKED = """
import json, time
import torch, tiedconv
from tiedconv.sources.torchvision_compat import import_torchvision
import_torchvision()
{prepare}
start = time.process_time()
{work}
print(json.dumps(time.process_time() - start))
"""

PLAN = """
from typer.testing import CliRunner
from tiedconv.cli import app
assert CliRunner().invoke(app, ["plan", "vit_b_16", "--weights", "none"]).exit_code == 0
"""

MODEL = """
import torchvision
from tiedconv.data import TensorList
from tiedconv.training import Step, TrainConfig, train
torch.manual_seed(0)
options = {{"image_size": 96}} if "vit" in {name!r} else {{}}
model = tiedconv.convert(getattr(torchvision.models, {name!r})(**options), "tied")
data = TensorList(torch.rand(64, 3, 96, 96), [i % 10 for i in range(64)])
few = TensorList(torch.zeros(2, 3, 96, 96), [0, 1])
config = TrainConfig(
    epochs=None, steps={steps}, batch_size=16, eval_every_epoch=False, workers=0,
    bn_recalibrate=0, amp="off", lr=1e-4,
)
begin, taken = [], []
def listen(event):
    if isinstance(event, Step) and event.step >= {steps} // 3:
        (taken if begin else begin).append((event.step, time.process_time()))
"""

TRAIN = """
train(model, data, few, config, device="cpu", on_event=listen)
print(json.dumps((taken[-1][1] - begin[0][1]) / (taken[-1][0] - begin[0][0])))
raise SystemExit
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout of the state before")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="some of the cases")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        works = cases(folder)
        chosen = {n: w for n, w in works.items() if not args.only or n in args.only}
        rows = [compare(name, work, args.before, args.rounds) for name, work in chosen.items()]
    record = {"before": commit(args.before), "after": commit(HERE)}
    args.result.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def cases(folder: str) -> dict[str, str]:
    """What is measured: a name, and the Python code of its process."""
    dense, out = f"{folder}/dense.safetensors", f"{folder}/out.safetensors"
    make_dense(dense)
    works = {"plan": CLOCKED.format(prepare="", work=PLAN)}
    for name, (scheme, options) in CASES.items():
        work = CONVERT.format(scheme=scheme, options=options, dense=dense, out=out)
        works[f"convert, {name}"] = CLOCKED.format(prepare="", work=work)
    for name, steps in (("vit_b_16", 12), ("resnet50", 18)):
        prepare = MODEL.format(name=name, steps=steps)
        works[f"train, {name}"] = CLOCKED.format(prepare=prepare, work=TRAIN)
    return works


def compare(name: str, work: str, before: Path, rounds: int) -> dict[str, Any]:
    """Processor seconds before and after, and their ratio within a round."""
    pairs = []
    for i in range(rounds + 1):
        order = (before, HERE) if i % 2 else (HERE, before)
        found = {checkout: seconds(work, checkout) for checkout in order}
        pairs.append((found[before], found[HERE]))
    pairs = pairs[1:]  # the first warms up
    ratios = sorted(b / a for a, b in pairs)
    row = {
        "what": name,
        "rounds": rounds,
        "seconds_before": round(statistics.median(a for a, _ in pairs), 3),
        "seconds_after": round(statistics.median(b for _, b in pairs), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(ratios[0], 3),
        "ratio_high": round(ratios[-1], 3),
    }
    print(row, flush=True)
    return row


def seconds(work: str, checkout: Path) -> float:
    """Processor seconds of a piece of work under one checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
    done = subprocess.run(
        [sys.executable, "-c", work], check=True, capture_output=True, text=True, env=environment
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def commit(checkout: Path) -> str:
    """The short name of the commit that is checked out."""
    line = ["git", "-C", str(checkout), "rev-parse", "--short=10", "HEAD"]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
