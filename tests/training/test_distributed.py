"""Training by several processes, and training that is killed: each in real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import World

from tiedconv.io.run_state import read_state

HERE = Path(__file__).parents[1] / "helpers"
WORKER = HERE / "training_worker.py"
ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}:{HERE.parents[1]}",
}  # fmt: skip
TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
]  # fmt: skip

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and signals are those of POSIX")


def started(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command], env=ENVIRONMENT, text=True, capture_output=True,
        timeout=300, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same training by one process and by two."""
    folder = tmp_path_factory.mktemp("curves")
    started([sys.executable, WORKER, "curves", folder])
    started([*TORCHRUN, WORKER, "curves", folder])
    one, two = (torch.load(folder / f"{n}.pt", weights_only=True) for n in (1, 2))
    return one, two


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("scheme", ["tied", "lors"])
def test_two_processes_train_as_one(
    curves: tuple[dict[str, Any], dict[str, Any]], scheme: str, kind: str, accumulate: int
) -> None:
    one, two = curves
    expected, found = one[f"{scheme} alone 1"], two[f"{scheme} {kind} {accumulate}"]
    assert len(expected["losses"]) == 12
    assert len(set(expected["losses"])) == 12
    difference = [abs(a - b) for a, b in zip(expected["losses"], found["losses"], strict=True)]
    assert max(difference) < 1e-4
    # Adam turns rounding into steps where a gradient is all but zero, so not bit by bit.
    for name, tensor in expected["model"].items():
        assert (tensor - found["model"][name]).abs().max() < 2e-3, name
    assert found["stored"] == found["once"] == expected["stored"]
    assert found["result"] == pytest.approx(expected["result"], abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_features_as_one(
    curves: tuple[dict[str, Any], dict[str, Any]], kind: str
) -> None:
    one, two = curves
    expected, found = one["imitated alone"], two[f"imitated {kind}"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-4)
    assert found["result"] == pytest.approx(expected["result"], abs=1e-3)
    assert expected["result"][1] > expected["result"][0]  # nearer to the teacher than before


@pytest.mark.slow
def test_two_processes_end_with_the_start_if_all_else_is_worse(tmp_path: Path) -> None:
    started([*TORCHRUN, WORKER, "harmful", tmp_path])
    found = torch.load(tmp_path / "harmful.pt", weights_only=True)
    assert found == {kind: {"kept": 0, "same": [True, True]} for kind in ("ddp", "fsdp")}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["tied", "lors"])
def test_shards_train_as_replicas_do(
    curves: tuple[dict[str, Any], dict[str, Any]], scheme: str
) -> None:
    """With all that a recipe may ask for; mixing depends on the process, so one is no measure."""
    _, two = curves
    replicas, shards = (two[f"{scheme} {kind} recipe"] for kind in ("ddp", "fsdp"))
    assert shards["losses"] == pytest.approx(replicas["losses"], abs=1e-4)
    for name, tensor in replicas["model"].items():
        assert (tensor - shards["model"][name]).abs().max() < 2e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("scheme", ["tied", "lors"])
def test_where_one_process_is_asked_to_stop_all_do_and_go_on(
    curves: tuple[dict[str, Any], dict[str, Any]], scheme: str, kind: str
) -> None:
    _, two = curves
    in_one_go, resumed = two[f"{scheme} {kind} recipe"], two[f"{scheme} {kind} resumed"]
    assert resumed["signum"] == signal.SIGTERM
    assert 0 < len(resumed["losses"]) < 12
    assert resumed["losses"] == in_one_go["losses"][-len(resumed["losses"]) :]
    for name, tensor in in_one_go["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert resumed["result"] == in_one_go["result"]


def command(world: World, *more: object) -> list[str]:
    words = [
        "finetune", world.tied, "--data", world.data, "-o", "out.safetensors", "--workers", 0,
        "--device", "cpu", "--batch-size", 3, "--teacher", world.weights, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_with_the_same_bytes(
    world: World, tmp_path: Path
) -> None:
    """`kill -9` at random moments: in steps, evaluations, and while a state is written."""
    arguments = command(
        world,
        "--epochs",
        24,
        "--force",
        "--checkpoint-minutes",
        0,
        "--augment",
        "crop",
        "--lr",
        1e-3,
        "--log",
        "log.jsonl",
    )
    started([sys.executable, WORKER, "killed", tmp_path, 10, *arguments])
    reported = json.loads((tmp_path / "reported.json").read_text())
    assert reported["killed"] == 10
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert digest(whole / "out.safetensors") == digest(parts / "out.safetensors")
    assert {p.name for p in parts.iterdir()} == {
        "out.safetensors", "out.training.png", "log.jsonl",
    }  # fmt: skip
    # Each epoch stands in the log once, in order, though most were begun more than once.
    lines = [json.loads(line) for line in (parts / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == list(range(1, 25))


def begun(code: str, arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    """A process of its own that runs this code, which calls the command."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, cwd=folder, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    "signum", [pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGTERM, signal.SIGINT)]
)
def test_a_signal_saves_and_stops(world: World, tmp_path: Path, signum: int) -> None:
    arguments = command(world, "--epochs", 2000)
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from tiedconv.cli import main; sys.argv[0] = 'tiedconv'; main()"
    )
    with begun(code, arguments, tmp_path) as process:
        run = tmp_path / "out.safetensors.run"
        for _ in range(600):
            if any(run.glob("step-*.safetensors")):
                break
            time.sleep(0.05)
        process.send_signal(signum)
        _, reported = process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    assert "--resume" in reported
    assert "Interrupted" in reported
    newest = sorted(run.glob("step-*.safetensors"))[-1]
    state = read_state(newest, "training")
    assert newest.name == f"step-{state['progress']['step']:09d}.safetensors"
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.slow
def test_where_the_first_cannot_write_it_alone_says_so(world: World, tmp_path: Path) -> None:
    """Its disk is full; the other process must not die of it with words of its own."""
    script = tmp_path / "full.py"
    script.write_text(
        "from tiedconv.io import run_state\n"
        "def full(*a): raise OSError(28, 'No space left on device')\n"
        "run_state.save_tensors = full\n"
        "from tiedconv.cli import main\n"
        "main()\n"
    )
    words = [*TORCHRUN, str(script), *command(world, "--epochs", 1)]
    done = subprocess.run(
        words, env=ENVIRONMENT, text=True, capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "No space left on device" in done.stderr
    assert "engine.py" not in done.stderr  # torchrun has a traceback of its own
    assert "gloo" not in done.stderr.lower()


@pytest.mark.slow
def test_a_second_signal_stops_at_once(world: World, tmp_path: Path) -> None:
    """Even where the first can't be forward_with_grad, as a disk does not answer."""
    arguments = command(world, "--epochs", 2000)
    code = (
        "import sys, time\n"
        "from tiedconv.io import run_state; save = run_state.save_tensors\n"
        "def slow(*a): save(*a); print('saving', flush=True); time.sleep(600)\n"
        "run_state.save_tensors = slow\n"
        "from tiedconv.cli import main; sys.argv[0] = 'tiedconv'; main()"
    )
    with begun(code, arguments, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None  # it would save first
        process.send_signal(signal.SIGTERM)
        _, reported = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in reported


@pytest.mark.slow
def test_the_command_runs_in_two_processes(world: World, tmp_path: Path) -> None:
    written = ["log.jsonl", "board", "out.training.png"]
    arguments = command(
        world, "--epochs", 1, "--json", "--log-file", "log.jsonl", "--tensorboard", "board"
    )
    done = started([*TORCHRUN, "-m", "tiedconv", *arguments], cwd=tmp_path)
    reported = json.loads(done.stdout)  # one of them tells
    assert reported["result"]["steps"] > 0
    import tiedconv

    assert tiedconv.report(tmp_path / "out.safetensors").history[-1]["processes"] == 2
    assert {p.name for p in tmp_path.iterdir()} == {"out.safetensors", *written}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("end") == 1


@pytest.mark.slow
def test_a_mistake_is_reported_once(world: World, tmp_path: Path) -> None:
    words = [*TORCHRUN, "-m", "tiedconv", *command(world, "--batch-size", 1)]
    done = subprocess.run(
        words, env=ENVIRONMENT, text=True, capture_output=True, cwd=tmp_path, check=False
    )
    assert done.returncode != 0
    assert done.stderr.count("error: 2 processes share batches of 1 images") == 1


@pytest.mark.slow
def test_the_command_of_the_readme_runs(world: World, tmp_path: Path) -> None:
    readme = (HERE.parents[1] / "README.md").read_text("utf-8")
    (line,) = [row for row in readme.splitlines() if row.startswith(".venv/bin/torchrun ")]
    for name, path in {
        "demo-output/vit-tied.safetensors": world.tied,
        "demo-output/vit-dense.safetensors": world.weights,
        "demo-output/digits": world.data,
    }.items():
        assert name in line
        line = line.replace(name, str(path))
    words = line.split()[1:]
    started([*TORCHRUN[:3], *words, "--workers", 0], cwd=tmp_path)
    assert (tmp_path / "finetuned.safetensors").is_file()


@pytest.mark.slow
def test_memory_that_runs_out_in_one_process_stops_none(tmp_path: Path) -> None:
    """All agree on a batch size that fits everywhere, and on compiling or not; none waits."""
    started([*TORCHRUN, WORKER, "full", tmp_path])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {
        "ddp": [16, 16], "ddp steps": 2, "fsdp": [16, 16], "fsdp steps": 2,
        "reasons": ["another process could not compile it"],
    }  # fmt: skip
