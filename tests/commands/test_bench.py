"""What `bench` measures, each form in its own process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import figures, refused, run
from export_helpers import MODEL_ARGS, SPEC, with_image_size

import tiedconv
from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands.bench import Bench, Measured, Timing, bench, draw, ratio_to_dense
from tiedconv.errors import RunError
from tiedconv.runtime.tie import set_state
from tiedconv.sources import Source


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact file of some megabytes, so that its memory stands out of noise."""
    path = tmp_path_factory.mktemp("bench") / "m.safetensors"
    arguments = {**MODEL_ARGS, "embed_dim": 384, "num_heads": 6}
    model = tiedconv.convert(SPEC, "lowrank", params="40%", model_args=arguments, weights="none")
    tiedconv.save(with_image_size(model), path)
    return path


@pytest.fixture(scope="module")
def found(compact: Path) -> dict[str, Any]:
    made: dict[str, Any] = figures("bench", compact, "--rounds", 3, "--batch-size", "1,2")
    return made


def rows_of(found: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for row in found["rows"]:
        yield (row["runtime"], row["model"]), row


@pytest.mark.slow
def test_each_form_is_measured_against_the_dense_one(found: dict[str, Any]) -> None:
    rows = dict(rows_of(found))
    assert list(rows) == [
        ("eager", "dense"), ("eager", "compact"), ("cached", "compact"), ("factored", "compact"),
        ("optimized", "compact"), ("onnx", "dense"), ("onnx", "compact"), ("onnx-lean", "compact"),
    ]  # fmt: skip
    for (_, model), row in rows.items():
        assert row["load_seconds"] > 0
        for timing, batch in zip(row["timings"], (1, 2), strict=True):
            assert timing["batch"] == batch
            assert timing["seconds"] > 0
            if model == "dense":
                assert timing["ratio"] is None
            else:
                assert timing["low"] <= timing["ratio"] <= timing["high"]
    assert not found["left_out"]


@pytest.mark.slow
def test_memory_is_what_the_weights_take(found: dict[str, Any]) -> None:
    rows = dict(rows_of(found))
    dense = 4 * 3_600_000  # bytes of the dense model's weights, about
    for runtime in ("eager", "onnx"):
        assert 0.7 * dense < rows[runtime, "dense"]["held_bytes"] < 2.5 * dense
    for lean in (("factored", "compact"), ("onnx-lean", "compact"), ("eager", "compact")):
        runtime = "onnx" if "onnx" in lean[0] else "eager"
        assert rows[lean]["held_bytes"] < 0.8 * rows[runtime, "dense"]["held_bytes"]


@pytest.mark.slow
def test_compiled_forms_are_compared_with_the_compiled_dense_one(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = tiedconv.convert(SPEC, "tied", model_args={**MODEL_ARGS, "depth": 1}, weights="none")
    tiedconv.save(with_image_size(model), path)
    made = figures("bench", path, "--runtime", "compiled", "--rounds", 3, "--batch-size", "1")
    assert [(row["runtime"], row["model"]) for row in made["rows"]] == [
        ("compiled", "dense"), ("compiled", "compact"), ("compiled-optimized", "compact"),
    ]  # fmt: skip
    assert made["rows"][1]["timings"][0]["ratio"] > 0
    assert not made["left_out"]


def made_up(*, dense: bool = True) -> Bench:
    eager = Measured("eager", "dense", "eager", 0, 5.0, 9, (Timing(1, 0.6, None, None, None),))
    onnx = Measured("onnx", "dense", "onnx", 400, 0.2, 1000, (Timing(1, 0.6, None, None, None),))
    timing = Timing(1, 0.5, 0.9, 0.8, 1.2) if dense else Timing(1, 0.5, None, None, None)
    compact = Measured("onnx", "compact", "onnx", 200, 0.1, 500, (timing,))
    rows = (eager, onnx, compact) if dense else (eager, compact)
    return Bench(Path("m.safetensors"), rows, 20, 1, "a processor")


def test_ratios_are_to_the_dense_form_in_the_same_runtime(tmp_path: Path) -> None:
    made = made_up()
    assert ratio_to_dense(made.rows[-1], made, "held_bytes") == 0.5
    assert ratio_to_dense(made.rows[-1], made, "load_seconds") == 0.5
    assert made.rows[-1].timings[0].images_per_second == 2.0
    draw(made, tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert "svg" in text
    assert len(text) > 1000
    without = made_up(dense=False)
    assert ratio_to_dense(without.rows[-1], without, "held_bytes") is None


def test_without_its_dense_form_a_row_has_no_ratio(
    compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiedconv.commands.bench.bench", lambda *_, **__: made_up(dense=False))
    line = next(n for n in run("bench", compact).stdout.splitlines() if " compact " in n)
    assert "500 ms" in line
    assert "500 B" in line
    assert "(" not in line


def test_the_table_says_what_the_figures_say(
    compact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tiedconv.commands.bench.bench", lambda *_, **__: made_up())
    shown = run("bench", compact, "-o", tmp_path / "b.png").stdout
    assert "500 ms 0.90 (0.80-1.20)" in shown
    assert "500 B 0.50" in shown
    assert "a processor" in shown
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_what_can_not_be_measured_is_refused(compact: Path, tmp_path: Path) -> None:
    refused("bench", compact, "--runtime", "tensorrt", error_code="unknown-runtime")
    refused("bench", compact, "--batch-size", "one", error_code="invalid-batch-sizes")
    refused("bench", compact, "--batch-size", "0", error_code="nothing-to-measure")
    refused("bench", tmp_path / "gone.safetensors", error_code="file-not-found")
    refused("bench", compact, "-o", tmp_path / "b.gif", error_code="unknown-picture-format")


# The protocol with a worker


class Linear(torch.nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        block = torch.nn.Sequential
        self.blocks = block(*(block(torch.nn.Linear(8, 8), torch.nn.ReLU()) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, 1, 1, 8)` to `(n, 8)`."""
        sys.stdout.write("a line of the model\n")
        return self.blocks(x).flatten(1)  # type: ignore[no-any-return]


def noisy() -> torch.nn.Module:
    """As a native library: past Python's `sys.stdout`, more than a pipe holds, and no JSON."""
    os.write(1, b"a warning\n{}\n")
    os.write(2, b"E" * 200_000)
    return Linear()


def dying() -> torch.nn.Module:
    """As one that the kernel kills for its memory, with a child that holds its pipes open."""
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.write(2, b"the last line\n")
    os._exit(7)


class Buggy(Linear):
    """A model with a bug."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A bug."""
        raise KeyError("block")


def buggy() -> torch.nn.Module:
    """That model."""
    return Buggy()


def target(tmp_path: Path, function: str) -> BenchTarget:
    """What runs a file whose model a function of this module builds."""
    model = tiedconv.convert(Linear(), "shared")
    set_state(model, source=Source(f"test_bench:{function}").to_json())
    tiedconv.save(model, tmp_path / "m.safetensors")
    file = str(tmp_path / "m.safetensors")
    return BenchTarget(file, "eager", shape=(1, 1, 8), trust_code=True)


@pytest.fixture
def deadline() -> Iterator[None]:
    """Fails a test that hangs."""

    def hung(*_: object) -> None:
        raise TimeoutError("the driver waits for a worker that will not answer")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(180)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a worker import this module."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *sys.path]))


@pytest.mark.slow
@pytest.mark.usefixtures("deadline")
def test_what_libraries_print_is_no_answer_and_blocks_nothing(
    tmp_path: Path, importable: None
) -> None:
    with contextlib.closing(Process(target(tmp_path, "noisy"))) as process:
        seconds, _ = process.load()
        assert seconds > 0
        assert process.run(2) > 0
        assert process.peak() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("deadline")
def test_a_process_that_ends_is_reported_with_its_last_line(
    tmp_path: Path, importable: None
) -> None:
    with contextlib.closing(Process(target(tmp_path, "dying"))) as process:
        with pytest.raises(RunError) as caught:
            process.load()
        assert caught.value.code == "bench-process-ended"
        assert "(the last line)" in caught.value.what
        with pytest.raises(RunError) as caught:
            process.run(1)
        assert caught.value.code == "bench-process-ended"


@pytest.mark.slow
def test_an_error_in_a_process_has_its_class_and_traceback(
    tmp_path: Path, importable: None
) -> None:
    with contextlib.closing(Process(target(tmp_path, "buggy"))) as process:
        process.load()
        with pytest.raises(RunError) as caught:
            process.run(1)
        assert caught.value.code == "bench-target-failed"
        assert "KeyError: 'block'" in caught.value.what
        assert "in forward" in str(caught.value.__cause__)


@pytest.mark.slow
def test_a_file_that_a_runtime_can_not_load(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with contextlib.closing(Process(BenchTarget(str(tmp_path / "m.onnx"), "onnx"))) as process:
        with pytest.raises(RunError) as caught:
            process.load()
        assert caught.value.code == "bench-target-failed"
        assert "m.onnx" in caught.value.what
        process._process.kill()
        with pytest.raises(RunError) as caught:
            process.run(1)
        assert caught.value.code == "bench-process-ended"


def test_the_files_of_two_runtimes_do_not_meet(compact: Path) -> None:
    pytest.importorskip("openvino")
    made = bench(compact, runtimes=["onnx", "openvino"], batches=[1], rounds=3)
    assert made.left_out == ()
    found = [(row.runtime, row.model) for row in made.rows]
    assert found == [
        ("onnx", "dense"), ("onnx", "compact"), ("onnx-lean", "compact"),
        ("openvino", "dense"), ("openvino", "compact"),
    ]  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, *runtimes: str) -> None:
    """Let these runtimes fail."""
    load = Process.load

    def fail(self: Process) -> tuple[float, int]:
        if self.target.runtime in runtimes:
            raise RunError(f"{self.target.runtime} can't run")
        return load(self)

    monkeypatch.setattr(Process, "load", fail)


@pytest.mark.slow
def test_a_form_that_fails_leaves_the_others(
    compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "cached")
    made = bench(compact, runtimes=["eager"], batches=[1], rounds=3)
    assert [row.runtime for row in made.rows] == ["eager", "eager", "factored", "optimized"]
    assert made.left_out == (("cached, compact", "cached can't run"),)


@pytest.mark.slow
def test_where_nothing_can_be_compared_the_command_fails(
    compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, "eager")  # its dense form too
    words = ["eager, dense: eager can't run"]
    refused("bench", compact, "--runtime", "eager", "--rounds", 3, "--batch-size", 1,
            error_code="nothing-compared", words=words, code=1)  # fmt: skip
