"""Time of a training step: tied and `lors` models against dense ones, our loop against others.

    python benchmarks/training_speed.py [--models vit resnet50] [--size 96] [--batch 16]
    python benchmarks/training_speed.py --device cuda [--batch 256]

On the CPU four candidates take turns, each in a process of its own that lives on for a group of
rounds: our loop on the tied, the `lors` (half of the parameters) and the dense model, and a
minimal loop written by hand on the dense model. All train by one recipe: AdamW (fused), a cosine,
clipping, the same augmentation, with and without a teacher. Each turn is some steps with all that
belongs to them, reading included; ratios are taken within a round of turns, so that a machine
whose speed drifts still gives fair figures. Images lie in memory, or in JPEG files that are
decoded in the process itself, where its CPU time counts them.

On a GPU the candidates run one after another: images a second and peak memory in bfloat16 at 224
px, against timm's own pieces of a training step (`training_baselines.py`).

Each row goes to `benchmarks/results/training_speed.json` when it is done, and replaces the row of
the same setting.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_baselines import by_hand, by_timm, make_model

import tiedconv
from tiedconv.data import ImageList, TensorList, open_images, train_transform
from tiedconv.sources import Preprocess
from tiedconv.training import Baseline, Step, TrainConfig, train

RESULT = Path(__file__).parent / "results" / "training_speed.json"
KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Lets glibc keep the memory that a step frees. Else some processes give it back and take it again
in each step, by luck: up to a fifth of a ResNet's step, whatever the loop."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTENDERS = ("tied", "lors", "dense", "by hand")
PAIRS = (("tied", "dense"), ("lors", "dense"), ("dense", "by hand"), ("tied", "by hand"),
         ("lors", "by hand"))  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one candidate does."""

    model: str
    form: str
    images: str  # "memory" or "files"
    teacher: bool
    size: int
    batch: int
    threads: int
    device: str = "cpu"
    loop: str = "tiedconv"
    compile: bool = False
    steps: int = 10**6
    count: int = 2048
    folder: str = ""


class Stop(Exception):
    """The benchmark is over."""


class Turns:
    """A candidate's side of the turns: waits until it may go on, tells what a turn took."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe, self.done = pipe, 0

    def wait(self) -> None:
        """Until it may take steps; raises Stop when none are left to take."""
        wanted = self.pipe.recv()
        if wanted is None:
            raise Stop
        self.first, self.wanted = self.done, self.done + wanted
        self.start = time.perf_counter(), time.process_time()

    def at(self, step: int) -> None:
        """So many steps were taken, and their losses have been read."""
        self.done = step
        if step >= self.wanted:
            wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
            steps = step - self.first
            self.pipe.send({"steps": steps, "wall": wall / steps, "cpu": cpu / steps})
            self.wait()

    def __call__(self, event: object) -> None:
        if isinstance(event, Baseline):
            self.wait()
        elif isinstance(event, Step):
            self.at(event.step)


def converted(dense: nn.Module, form: str) -> nn.Module:
    """The dense model in one of the forms."""
    if form == "dense":
        return dense
    return tiedconv.convert(dense, form, params="50%" if form == "lors" else None)


def data_of(case: Case) -> ImageList | TensorList:
    """Images of noise: in memory of the model's size, as files a third larger."""
    if case.images == "files":
        preprocess = Preprocess(case.size, case.size, MEAN, STD)
        return ImageList(open_images(case.folder), train_transform(preprocess, "crop"))
    draws = torch.Generator().manual_seed(0)
    shape = case.count, 3, case.size, case.size
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, 1000, (case.count,), generator=draws)
    augment = "crop" if case.device == "cpu" else "none"
    return TensorList(images, labels, mean=MEAN, std=STD, augment=augment)


def config_of(case: Case) -> TrainConfig:
    """The recipe of all candidates."""
    return TrainConfig(
        epochs=None, steps=case.steps, batch_size=case.batch, eval_every_epoch=False, workers=0,
        bn_recalibrate=0, amp="off" if case.device == "cpu" else "bf16", compile=case.compile,
    )  # fmt: skip


def contend(pipe: Connection, case: Case) -> None:
    """The process of one candidate."""
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    try:
        if case.device == "cpu" and case.steps == 10**6:
            taking_turns(pipe, case)
        else:
            pipe.send(measured(case))
    except Stop:
        pass
    except Exception as error:  # whatever it is, it belongs into the row
        pipe.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def taking_turns(pipe: Connection, case: Case) -> None:
    """Trains, some steps in each turn, until it is stopped."""
    dense = make_model(case.model, case.size)
    teacher = make_model(case.model, case.size).eval() if case.teacher else None
    data, config, turns = data_of(case), config_of(case), Turns(pipe)
    pipe.send("ready")
    if case.loop == "by hand":
        turns.wait()
        by_hand(dense, data, config, teacher, turns.at)
    else:
        few = TensorList(torch.zeros(2, 3, case.size, case.size), [0, 1])
        model = converted(dense, case.form)
        train(model, data, few, config, teacher=teacher, device="cpu", on_event=turns)


def measured(case: Case) -> dict[str, Any]:
    """Images a second and peak memory of one candidate, the first half of its steps not counted."""
    times: list[tuple[int, float]] = []

    def report(event: object) -> None:
        if isinstance(event, Step):
            times.append((event.step, time.perf_counter()))

    model = converted(make_model(case.model, case.size), case.form)
    data = data_of(case)
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if case.loop == "timm":
        times = by_timm(model, data, config_of(case), torch.device(case.device))
    else:
        few = TensorList(torch.zeros(2, 3, case.size, case.size), [0, 1])
        train(model, data, few, config_of(case), device=case.device, on_event=report)
    half = next(i for i, (step, _) in enumerate(times) if step >= case.steps // 2)
    (first, start), (last, end) = times[min(half, len(times) - 2)], times[-1]
    found: dict[str, Any] = {"images_per_second": (last - first) * case.batch / (end - start)}
    if case.device == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def started(case: Case) -> tuple[Any, Connection]:
    """A candidate's process and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=contend, args=(there, case), daemon=True)
    process.start()
    there.close()
    return process, here


def heard(pipe: Connection) -> Any:
    """What a candidate says; raises RuntimeError where it is an error or its end."""
    try:
        said = pipe.recv()
    except EOFError:
        said = {"error": "its process ended"}
    if isinstance(said, dict) and "error" in said:
        raise RuntimeError(said["error"])
    return said


Turn = dict[str, float]


def group(cases: Mapping[str, Case], rounds: int, steps: int) -> dict[str, list[Turn]]:
    """Seconds of a step of each candidate in each round."""
    running: dict[str, tuple[Any, Connection]] = {}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    try:
        for name, case in cases.items():  # one after another: converting takes memory and time
            running[name] = started(case)
            heard(running[name][1])
        for i in range(rounds + 1):
            order = list(cases) if i % 2 else list(reversed(cases))
            for name in order:
                running[name][1].send(steps)
                turns[name].append(heard(running[name][1]))
    finally:
        for process, pipe in running.values():
            with contextlib.suppress(OSError):  # it may have ended already
                pipe.send(None)
            process.join(60)
            process.kill()
    return {name: found[1:] for name, found in turns.items()}  # the first round warms up


def compared(groups: Sequence[Mapping[str, list[Turn]]]) -> dict[str, Any]:
    """Medians and ratios of the rounds of several groups."""
    kept = {name: [turn for found in groups for turn in found[name]] for name in groups[0]}
    seconds = {
        name: {what: statistics.median(t[what] for t in found) for what in ("wall", "cpu")}
        for name, found in kept.items()
    }
    ratios = {
        f"{a} / {b}": {w: spread([x[w] / y[w] for x, y in zip(kept[a], kept[b], strict=True)])
                       for w in ("wall", "cpu")}
        for a, b in PAIRS if a in kept and b in kept
    }  # fmt: skip
    return {"seconds": seconds, "ratios": ratios}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the bounds of the middle 80 %."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    found = {"median": statistics.median(values), "low": tenths[0], "high": tenths[-1]}
    return {name: round(value, 4) for name, value in found.items()}


def on_cpu(args: argparse.Namespace) -> None:
    """A row for each model, kind of images, with and without a teacher."""
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), args.size * 4 // 3, 512)
        for images in args.images:
            for model in args.models:
                for teacher in args.teachers:
                    setting = {
                        "model": model, "images": images, "teacher": teacher == "yes",
                        "size": args.size, "batch": args.batch, "threads": args.threads,
                    }  # fmt: skip
                    cases = {
                        name: Case(
                            **setting, form="dense" if name == "by hand" else name, folder=folder,
                            loop="by hand" if name == "by hand" else "tiedconv",
                        )
                        for name in CONTENDERS
                    }  # fmt: skip
                    rounds = args.groups * args.rounds
                    row = {**setting, "device": "cpu", "rounds": rounds, "groups": args.groups}
                    try:
                        # A process may be lucky or not with its memory, all its life.
                        groups = [group(cases, args.rounds, args.steps) for _ in range(args.groups)]
                        row |= compared(groups)
                    except RuntimeError as error:
                        row["error"] = str(error)
                    written(args.result, row, [*setting, "device"])


def on_gpu(args: argparse.Namespace) -> None:
    """A row for each model, form, loop, with and without compiling."""
    for model in args.models:
        for form, loop in (
            ("dense", "timm"), ("dense", "tiedconv"), ("tied", "tiedconv"), ("lors", "tiedconv")
        ):  # fmt: skip
            for compiles in (False, True):
                case = Case(
                    model, form, "memory", False, args.size, args.batch, args.threads,
                    device=args.device, loop=loop, compile=compiles, steps=args.steps,
                    count=max(4 * args.batch, 16),
                )  # fmt: skip
                keys = ("model", "form", "loop", "compile", "size", "batch", "device")
                row = {key: asdict(case)[key] for key in keys}
                process, pipe = started(case)
                try:
                    row |= heard(pipe)
                except RuntimeError as error:
                    row["error"] = str(error)
                process.join()
                written(args.result, row, keys)


def written(path: Path, row: dict[str, Any], keys: Sequence[str]) -> None:
    """Puts a row into the file, for the one of the same setting."""
    name = f"{platform.machine()} with {os.cpu_count()} cores"
    if row["device"] == "cuda" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    row |= {"device_name": name, "torch": str(torch.__version__)}
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    same = [r for r in rows if {k: r.get(k) for k in keys} == {k: row[k] for k in keys}]
    rows = [r for r in rows if r not in same] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    part.replace(path)
    print(json.dumps(row), flush=True)


def write_jpegs(folder: Path, size: int, count: int) -> None:
    """Smooth noise in four class folders."""
    import numpy as np
    from PIL import Image

    for i in range(count):
        draws = np.random.default_rng(i)
        coarse = draws.integers(0, 256, (size // 8, size // 8, 3), np.uint8)
        path = folder / str(i % 4) / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", help="vit, resnet50; vit_b on a GPU")
    parser.add_argument("--images", nargs="+", default=["memory", "files"])
    parser.add_argument("--teachers", nargs="+", default=["no", "yes"])
    parser.add_argument("--size", type=int, help="of the images, in pixels")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=4, help="of turns, in each group")
    parser.add_argument("--groups", type=int, default=3, help="of processes, one after another")
    parser.add_argument("--steps", type=int, help="of a turn; on a GPU of a run")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    parser.add_argument("--tiny", action="store_true", help="the GPU's rows, small, on any device")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    os.environ.update(KEEPING)  # of the candidates' processes
    gpu = args.device == "cuda" or args.tiny
    size, batch, steps = (32, 4, 8) if args.tiny else (224, 256, 80) if gpu else (96, 16, 2)
    args.size, args.batch, args.steps = args.size or size, args.batch or batch, args.steps or steps
    args.models = args.models or (["resnet50", "vit_ti" if args.tiny else "vit_b"] if gpu
                                  else ["vit", "resnet50"])  # fmt: skip
    (on_gpu if gpu else on_cpu)(args)


if __name__ == "__main__":
    main()
