"""What tests/training/test_distributed.py starts in processes of their own."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiedconv
from tiedconv.data import TensorList
from tiedconv.outputs import Imitated, Imitation, kind_of
from tiedconv.training import (
    DistContext,
    Interrupted,
    NotCompiled,
    TrainConfig,
    init_distributed,
    train,
)
from tiedconv.training.losses import LossMeter
from tiedconv.training.train_step import TrainStep
from tiedconv.training.wrappers import TrainWrapper

CLASSES = 5
STEPS = 12
RECIPE: dict[str, Any] = {
    "ema": 0.5, "layer_decay": 0.8, "mixup": 0.2, "cutmix": 1.0, "features": 0.1,
}  # fmt: skip


def curves(folder: Path) -> None:
    """Each scheme, replicated and sharded; the first process writes the losses of all steps."""
    found: dict[str, Any] = {}
    with init_distributed("cpu") as (processes, _):
        kinds = ["ddp", "fsdp"] if processes.several else ["alone"]
        for scheme in ("tied", "lors"):
            for kind in kinds:
                for accumulate in (1, 2):
                    name = f"{scheme} {kind} {accumulate}"
                    found[name] = curve(scheme, kind, accumulate=accumulate)
                found[f"{scheme} {kind} recipe"] = curve(scheme, kind, **RECIPE)
                if processes.several:
                    found[f"{scheme} {kind} resumed"] = resumed(
                        scheme, kind, processes, folder / f"{scheme}-{kind}"
                    )
        for kind in kinds:
            found[f"imitated {kind}"] = curve("tied", kind, imitated=True)
        if processes.first:
            torch.save(found, folder / f"{processes.count}.pt")


def vit(classes: int = CLASSES) -> nn.Module:
    """A ViT with dropout off: its masks would depend on who draws them."""
    from tiedconv.sources.torchvision_compat import import_torchvision

    import_torchvision()
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2,
        num_classes=classes,
    )  # fmt: skip
    return model


def images(count: int, seed: int) -> TensorList:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    pixels = torch.rand(count, 3, 16, 16, generator=generator)
    pixels[torch.arange(count), 0, labels * 3] += 1
    return TensorList(pixels, labels, mean=(0.5,) * 3, std=(0.3,) * 3, augment="crop")


def resumed(scheme: str, kind: str, processes: DistContext, folder: Path) -> dict[str, Any]:
    """A run of which one process is asked to stop, and what going on gives."""
    step = TrainStep.step

    def asked(self: TrainStep, *arguments: Any) -> Any:
        if processes.rank == 1 and arguments[3] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    TrainStep.step = asked  # type: ignore[method-assign]
    try:
        curve(scheme, kind, folder, **RECIPE)
    except Interrupted as stopped:
        signum = stopped.signum
    finally:
        TrainStep.step = step  # type: ignore[method-assign]
    processes.gathered(None)  # all have come here
    return {**curve(scheme, kind, folder, **RECIPE), "signum": int(signum)}


def curve(
    scheme: str, kind: str, folder: Path | None = None, *, imitated: bool = False, **options: Any
) -> dict[str, Any]:
    """The loss of each step, what the model is in the end, and what it holds on the way.

    With `imitated` the model has no classifier, and learns the features of its teacher.
    """
    losses: list[float] = []
    held: set[tuple[int, int]] = set()
    read, clip = LossMeter.read, TrainWrapper.clip

    def noted(self: LossMeter, *arguments: Any) -> list[float]:
        reported = read(self, *arguments)
        losses.extend(reported)
        return reported

    def counted(self: TrainWrapper, parameters: Any, most: float) -> Any:
        stored = [p for n, p in self.model.named_parameters() if n.startswith("tied/")]
        held.add((len(stored), len({id(p) for p in stored})))
        assert all(p.grad is not None for p in stored)
        return clip(self, parameters, most)

    LossMeter.read, TrainWrapper.clip = noted, counted  # type: ignore[method-assign]
    try:
        teacher = vit(0 if imitated else CLASSES)
        model = tiedconv.convert(copy.deepcopy(teacher), scheme)
        data: list[Any] = [images(61, 0), images(33, 1)]
        if imitated:
            task = Imitation(kind_of(torch.zeros(1, 32), teacher), teacher.eval())
            data = [Imitated(part, task) for part in data]
            options["distill_weight"] = 1.0
        config = TrainConfig(
            steps=STEPS, batch_size=15, lr=2e-3, sharding="ddp" if kind == "alone" else kind,
            eval_every_epoch=False, seed=3, keep_best=False,
            **{"distill_weight": 0.1, **options},
        )  # fmt: skip
        result = train(
            model, *data, config, teacher=teacher, device="cpu",
            checkpoint_dir=folder, resume=folder is not None,
        )  # fmt: skip
    finally:
        LossMeter.read, TrainWrapper.clip = read, clip  # type: ignore[method-assign]
    (stored, once), *others = held
    assert not others
    return {
        "losses": losses, "model": dict(model.state_dict()), "stored": stored, "once": once,
        "result": (*result.metrics_before.values(), *result.metrics.values(), result.steps),
    }  # fmt: skip


def harmful(folder: Path) -> None:
    """A training that only loses, by each sharding: what is left, and what the start was."""
    found: dict[str, Any] = {}
    with init_distributed("cpu") as (processes, _):
        for sharding in ("ddp", "fsdp"):
            model = tiedconv.convert(vit(), "tied")
            start = {name: t.clone() for name, t in model.state_dict().items()}
            config = TrainConfig(
                steps=4, batch_size=16, lr=1.0, clip=0.0, warmup=0.0, sharding=sharding,
                distill_weight=1.0,
            )  # fmt: skip
            result = train(
                model, images(64, 0), images(32, 1), config, teacher=vit(), device="cpu",
                checkpoint_dir=folder / sharding,
            )  # fmt: skip
            same = all(torch.equal(t, start[n]) for n, t in model.state_dict().items())
            found[sharding] = {"kept": result.kept_step, "same": processes.gathered(same)}
        if processes.first:
            torch.save(found, folder / "harmful.pt")


class Full(nn.Module):
    """A classifier that runs out of memory for more than `most` images, on the CPU for real."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.net, self.most = nn.Sequential(nn.Flatten(), nn.Linear(768, CLASSES)), most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and len(x) > self.most:
            torch.empty(2**58, dtype=torch.uint8)
        out: torch.Tensor = self.net(x)
        return out


def one_is_full(folder: Path) -> None:
    """Batch sizes and a compilation where one of the processes fails."""
    data = images(1024, 0), images(33, 1)
    found: dict[str, Any] = {}
    with init_distributed("cpu") as (processes, _):
        for sharding in ("ddp", "fsdp"):
            config = TrainConfig(steps=2, batch_size=0, sharding=sharding, eval_every_epoch=False)
            model = Full(8 if processes.rank == 1 else 10**9)
            result = train(model, *data, config, device="cpu")
            found[sharding] = processes.gathered(result.batch_size)
            found[f"{sharding} steps"] = result.steps
        torch.compile = not_here if processes.rank == 1 else lambda call: call
        events: list[Any] = []
        config = TrainConfig(steps=2, batch_size=8, compile=True, eval_every_epoch=False)
        train(Full(10**9), *data, config, device="cpu", on_event=events.append)
        found["reasons"] = [e.reason for e in events if isinstance(e, NotCompiled)]
        if processes.first:
            (folder / "found.json").write_text(json.dumps(found))


def not_here(call: Any) -> Any:
    def compiled(*arguments: Any) -> Any:
        raise RuntimeError("no compiler")

    return compiled


def killed(folder: Path, arguments: list[str], times: int) -> None:
    """The command in one go, and killed so many times at random moments and resumed each time.

    Each run is a fork of this process, which has imported all that is slow to import.
    """
    vit()
    whole, parts = folder / "whole", folder / "parts"
    for place in (whole, parts):
        place.mkdir()
    start = time.monotonic()
    assert wait(fork(whole, arguments)) == 0
    duration = time.monotonic() - start
    draw = random.Random(0)
    done = finished = 0
    while done < times:
        child = fork(parts, [*arguments, "--resume"])
        time.sleep(duration * draw.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            done += 1
        else:  # the work was done before; the next one does it again
            finished += 1
    assert wait(fork(parts, [*arguments, "--resume"])) == 0
    (folder / "reported.json").write_text(json.dumps({"killed": done, "finished": finished}))


def fork(place: Path, arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    from tiedconv.cli import main

    os.chdir(place)
    sys.argv = ["tiedconv", *arguments]
    code = 1
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    match sys.argv[1:]:
        case ["curves", folder]:
            curves(Path(folder))
        case ["harmful", folder]:
            harmful(Path(folder))
        case ["full", folder]:
            one_is_full(Path(folder))
        case ["killed", folder, times, *rest]:
            killed(Path(folder), rest, int(times))
