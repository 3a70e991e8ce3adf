"""`convert --calib`, as a user types it, on a tiny model and a tiny folder of images."""

from __future__ import annotations

import hashlib
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_helpers import (
    MODEL_ARGS,
    SPEC,
    World,
    figures,
    files_of,
    plain,
    refused,
    run,
    write_images,
)

import tiedconv
from tiedconv.calibration import EFFORTS, Effort, Fitted, config
from tiedconv.cli import progress
from tiedconv.utils.stage import Stage

HERE = ["--workers", "0", "--device", "cpu", "-n", 16]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.EFFORTS, "normal", Effort(1, 1, 4, 4, 1, 2))


def convert(world: World, output: Path, *more: object) -> list[object]:
    return [
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--calib", world.data,
        "--params", "70%", "-o", output, *HERE, *more,
    ]  # fmt: skip


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_file_and_the_words_report_the_calibration(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    text = plain(run(*convert(world, output, "--scheme", "tied")).stdout)
    assert "Calibrated on 16 images without labels, effort normal" in text
    assert "weighted by its effect on the outputs" in text
    assert "16 images are few" in plain(
        run(*convert(world, output, "--scheme", "tied", "--force")).stderr
    )
    record = tiedconv.report(output).history[0]["calibration"]
    assert record["images"] == 16
    assert record["effort"] == "normal"
    assert record["kl_after"] <= record["kl_before"]
    assert [names for names, _, _ in record["blocks"]] == [["blocks.0"], ["blocks.1"]]
    assert files_of(tmp_path) == {"c.safetensors"}  # nothing of the run is left
    assert all(check.passed for check in tiedconv.verify(output))


def test_json_has_the_same_figures(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    shown = figures(*convert(world, output, "--effort", "fast"))["calibration"]
    assert shown == dict(tiedconv.report(output).history[0]["calibration"])
    assert shown["blocks"] == []
    assert f"calibrated on {shown['images']} images (fast)" in plain(run("report", output).stdout)


def test_auto_takes_images_that_lie_in_no_class(world: World, tmp_path: Path) -> None:
    write_images(tmp_path / "classes")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate((tmp_path / "classes").rglob("*.png")):
        path.rename(flat / f"{i}.png")
    output = tmp_path / "auto.safetensors"
    shown = figures(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--calib", flat,
        "--scheme", "auto", "--params", "60%", "--effort", "fast", "-o", output, *HERE,
    )  # fmt: skip
    assert shown["ratio"] <= 0.6
    assert "auto" not in {group["scheme"] for group in shown["groups"]}


@pytest.fixture
def _signals_heeded() -> Iterator[None]:
    """Where tests were begun in the background, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals_heeded")
@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_an_interrupted_calibration_goes_on_to_the_same_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    run(*convert(world, whole, "--scheme", "lowrank"))
    tell = progress.ConvertBar.__call__

    def interrupted(self: progress.ConvertBar, event: object) -> None:
        tell(self, event)  # type: ignore[arg-type]
        if isinstance(event, Fitted) and event.index == 0:
            signal.raise_signal(signum)

    with monkeypatch.context() as patch:
        patch.setattr(progress.ConvertBar, "__call__", interrupted)
        result = run(*convert(world, cut, "--scheme", "lowrank"), code=128 + signum)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "--resume" in result.stderr
    assert not cut.exists()
    kept = files_of(tmp_path / "cut.safetensors.run")
    assert kept
    # Restarted without a warning, it would lose what is done.
    refused(
        *convert(world, cut, "--scheme", "lowrank"),
        error_code="run-interrupted",
        words=["--resume", "--force"],
    )
    assert files_of(tmp_path / "cut.safetensors.run") == kept
    result = run(*convert(world, cut, "--scheme", "lowrank", "--resume"))
    assert "patch_embed: relative" not in result.stderr  # it was not fitted again
    assert "resumed with 1 saved fit" in result.stderr
    assert tensors_of(cut) == tensors_of(whole)
    assert files_of(tmp_path) == {"whole.safetensors", "cut.safetensors"}
    again = ("--scheme", "lowrank", "--effort", "fast", "--resume", "--force")
    assert "starting from the beginning" in run(*convert(world, cut, *again)).stderr


@pytest.mark.slow
def test_where_no_bar_is_drawn_it_is_reported_now_and_then_how_far_it_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = run(*convert(world, tmp_path / "c.safetensors", "--batch-size", 4)).stderr
    for what in ("measuring ", "fitting ", "blocks ", "whole model "):
        assert re.search(rf"^{what}\d+/\d+  ", shown, re.MULTILINE), what
    monkeypatch.setattr(progress, "LINE_SECONDS", 60.0)
    shown = run(*convert(world, tmp_path / "d.safetensors")).stderr
    assert "measuring" not in shown


def tensors_of(path: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(path).items()}


def test_what_cannot_be_is_refused_before_anything_is_written(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    empty = tmp_path / "empty"
    empty.mkdir()
    base = ["convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", output, *HERE]
    refused(*base, "--calib", empty, error_code="no-images")
    refused(*base, "--calib", tmp_path / "nowhere", error_code="no-data-folder")
    refused(*base, "--dry-run", "--calib", tmp_path / "nowhere", error_code="no-data-folder")
    refused(*base, "--calib", world.data, "--params", "50", error_code="budget-without-percent")
    refused(
        *base,
        "--calib",
        world.data,
        "--effort",
        "heroic",
        error_code="invalid-calibration-option",
        words=[*EFFORTS],
    )
    for option in (
        ("--resume",),
        ("--effort", "fast"),
        ("--batch-size", 8),
        ("--strict",),
        ("-n", 100),
    ):
        refused(*base[: -len(HERE)], *option, error_code="needs-calib", words=["without --calib"])
    assert files_of(tmp_path) == {"empty"}


def test_a_budget_of_bytes_says_what_was_done(world: World, tmp_path: Path) -> None:
    output = tmp_path / "c.safetensors"
    command = [
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--calib", world.data,
        "--bytes", "60%", "--bits", 8, "--effort", "fast", "-o", output, *HERE,
    ]  # fmt: skip
    told = figures(*command)
    assert told["integers"] > 0
    assert output.stat().st_size <= told["rounding"]["bytes"]
    assert told["smaller"] == []
    assert "are stored as integers" in plain(run("report", output).stdout)
    assert all(check.passed for check in tiedconv.verify(output))
    refused(*command[: -len(HERE)], "--bits", "7", "--force", error_code="invalid-bits")
    assert files_of(tmp_path) == {"c.safetensors"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--params", "70%", "--effort", "fast"), "fit, calibrate, write"),
        (("--bytes", "30%", "--effort", "fast"), "fit, round, calibrate the rounded model, write"),
        (("--bytes", "30%"), "fit, calibrate, round, calibrate the rounded model, write"),
    ],
)
def test_the_stages_are_reported_in_order(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    names: str,
) -> None:
    seen: list[Stage] = []
    monkeypatch.setattr(progress.ConvertBar, "stage", lambda _, stage: seen.append(stage))
    base = convert(world, tmp_path / "c.safetensors", "--scheme", "lowrank")
    at = base.index("--params")
    run(*base[:at], *base[at + 2 :], *options)
    started = [stage for stage in seen if not stage.parts]
    assert ", ".join(stage.name for stage in started) == names
    assert [stage.number for stage in started] == list(range(1, started[0].count + 1))
    assert all(1 <= stage.part <= stage.parts for stage in seen if stage.parts)
