"""What `bench` measures, in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import figures, refused, run
from export_helpers import MODEL_ARGS, SPEC, with_image_size

import tiedconv
from tiedconv.commands._bench_worker import BenchTarget, Process
from tiedconv.commands.bench import Bench, Measured, Timing, bench, draw, share_of_dense
from tiedconv.errors import RunError


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compact file of some megabytes, so that its memory can be told from noise."""
    path = tmp_path_factory.mktemp("bench") / "m.safetensors"
    arguments = {**MODEL_ARGS, "embed_dim": 384, "num_heads": 6}
    model = tiedconv.convert(SPEC, "lowrank", params="40%", model_args=arguments, weights="none")
    tiedconv.save(with_image_size(model), path)
    return path


@pytest.fixture(scope="module")
def found(compact: Path) -> dict[str, Any]:
    made: dict[str, Any] = figures("bench", compact, "--rounds", 3, "--batch", "1,2")
    return made


def rows_of(found: dict[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    for row in found["rows"]:
        yield (row["runtime"], row["model"]), row


def test_each_form_is_measured_against_the_dense_one(found: dict[str, Any]) -> None:
    rows = dict(rows_of(found))
    assert list(rows) == [
        ("eager", "dense"), ("eager", "compact"), ("frozen", "compact"), ("applied", "compact"),
        ("onnx", "dense"), ("onnx", "compact"), ("onnx-lean", "compact"),
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


def test_memory_is_what_the_weights_take(found: dict[str, Any]) -> None:
    rows = dict(rows_of(found))
    dense = 4 * 3_600_000  # bytes of the dense model's weights, about
    for runtime in ("eager", "onnx"):
        assert 0.7 * dense < rows[runtime, "dense"]["held_bytes"] < 2.5 * dense
    for lean in (("applied", "compact"), ("onnx-lean", "compact"), ("eager", "compact")):
        runtime = "onnx" if "onnx" in lean[0] else "eager"
        assert rows[lean]["held_bytes"] < 0.8 * rows[runtime, "dense"]["held_bytes"]


def test_compiled_forms_are_compared_with_the_compiled_dense_one(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = tiedconv.convert(SPEC, "tied", model_args={**MODEL_ARGS, "depth": 1}, weights="none")
    tiedconv.save(with_image_size(model), path)
    made = figures("bench", path, "--runtime", "compiled", "--rounds", 3, "--batch", "1")
    assert [(row["runtime"], row["model"]) for row in made["rows"]] == [
        ("compiled", "dense"), ("compiled", "compact"),
    ]  # fmt: skip
    assert made["rows"][1]["timings"][0]["ratio"] > 0
    assert not made["left_out"]


def made_up() -> Bench:
    timing = Timing(1, 0.5, 0.9, 0.8, 1.2)
    dense = Measured("onnx", "dense", 400, 0.2, 1000, (Timing(1, 0.6, None, None, None),))
    return Bench(Path("m.safetensors"), (
        dense, Measured("onnx", "compact", 200, 0.1, 500, (timing,)),
    ), 20, 1, "a processor")  # fmt: skip


def test_shares_are_of_the_dense_form_in_the_same_runtime(tmp_path: Path) -> None:
    made = made_up()
    assert share_of_dense(made.rows[1], made, "held_bytes") == 0.5
    assert share_of_dense(made.rows[1], made, "load_seconds") == 0.5
    assert made.rows[1].timings[0].images_per_second == 2.0
    draw(made, tmp_path / "b.svg")
    text = (tmp_path / "b.svg").read_text()
    assert "svg" in text
    assert len(text) > 1000


def test_the_table_says_what_the_figures_say(
    compact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tiedconv.cli.bench.run", lambda *_, **__: made_up())
    shown = run("bench", compact, "-o", tmp_path / "b.png").stdout
    assert "500.0 ms (0.90, 0.80-1.20)" in shown
    assert "500 B (0.50)" in shown
    assert "a processor" in shown
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_what_can_not_be_measured_is_refused(compact: Path, tmp_path: Path) -> None:
    refused("bench", compact, "--runtime", "tensorrt", words=["'tensorrt'", "onnx"])
    refused("bench", compact, "--batch", "one", words=["'one'", "1,8,32"])
    refused("bench", compact, "--batch", "0", words=["nothing to measure"])
    refused("bench", tmp_path / "gone.safetensors", words=["gone.safetensors"])
    refused("bench", compact, "-o", tmp_path / "b.gif", words=["b.gif", ".png"])


def test_a_process_that_fails_or_ends_is_told(compact: Path, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    process = Process(BenchTarget(str(tmp_path / "m.onnx"), "onnx"))
    with pytest.raises(RunError, match=r"onnx can't run .*m.onnx"):
        process.load()
    process._process.kill()
    with pytest.raises(RunError, match="ended"):
        process.run(1)
    process.close()


def test_a_form_that_fails_leaves_the_others(
    compact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Process.load

    def failing(self: Process) -> tuple[float, int]:
        if self.contender.runtime == "frozen":
            raise RunError("frozen can't run", "It was not measured", "Leave it out")
        return load(self)

    monkeypatch.setattr(Process, "load", failing)
    made = bench(compact, runtimes=["eager"], batches=[1], rounds=3)
    assert [row.runtime for row in made.rows] == ["eager", "eager", "applied"]
    assert made.left_out == (("frozen, compact", "frozen can't run"),)
    assert torch.get_num_threads() >= 1
