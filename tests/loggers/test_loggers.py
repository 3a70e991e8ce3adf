"""What a fine-tuning leaves for those who watch it: log, TensorBoard, picture, progress line."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import QUICK, World, figures, files_of, plain, refused, run
from covering import slow_unless
from error_codes import raises
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from tiedconv.cli import progress
from tiedconv.errors import OutputError
from tiedconv.loggers import (
    Course,
    JsonLog,
    Run,
    Watcher,
    Watchers,
    curve,
    draw,
    memory,
    memory_in_use,
    watchers,
)
from tiedconv.loggers import tensorboard as board
from tiedconv.loggers.picture import smoothed
from tiedconv.training import (
    ACCURACY,
    AGREEMENT,
    Baseline,
    EpochEnd,
    EvalStep,
    Resumed,
    Start,
    Step,
    Unlabelled,
    engine,
)


@pytest.fixture(autouse=True)
def told_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "EVENT_SECONDS", 0.0)
    monkeypatch.setattr(engine, "READ_SECONDS", math.inf)  # slow machines read losses more often


def command(world: World, output: Path, *more: object) -> tuple[object, ...]:
    return (
        "finetune", world.tied, "--data", world.data, "-o", output, *QUICK, "--teacher",
        world.weights, "--epochs", 3, *more,
    )  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text("utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def stopped_in(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """A run is interrupted before it takes this step, and has saved nothing since its epoch."""
    take = engine._Run.take

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.at.step == step:
            self.emit(Step(self.at.epoch, step, (9.0,), 1.0, 1.0, 1.0))  # which is not saved
            raise KeyboardInterrupt
        return take(self, *arguments)

    monkeypatch.setattr(engine._Run, "take", interrupted)


# The log


class NoReport:
    model, groups, original, stored = "m", (), 2, 1


def test_a_log_has_a_line_for_all_that_happens(world: World, tmp_path: Path) -> None:
    out, path = tmp_path / "o.safetensors", tmp_path / "log.jsonl"
    reported = figures(*command(world, out, "--log", path, "--lr", 1e-3))
    assert reported["log"] == str(path)
    assert reported["picture"] == str(tmp_path / "o.training.png")
    assert reported["tensorboard"] is None
    assert reported["path"] == str(out)
    lines = lines_of(path)
    events = [line["event"] for line in lines]
    each = ["step", "epoch", "checkpoint"] * 3
    assert events == ["start", "baseline", "teacher", *each, "kept", "end"]
    start, baseline, teacher, step, epoch = lines[:5]
    assert start["model"].startswith("timm:vit_tiny")
    assert (start["scheme"], start["labels"], start["steps"], start["images"]) == (
        "tied", True, 9, 24,
    )  # fmt: skip
    assert 0 < start["stored"] < start["original"]
    assert start["options"]["lr"] == 1e-3
    assert set(start["versions"]) == {"tiedconv", "torch", "python"}
    assert baseline["top1"] == reported["result"]["top1_before"]
    assert teacher["top1"] == reported["result"]["top1_teacher"]
    assert step["epoch"] == 1
    assert step["step"] == epoch["step"] == 3
    assert step["loss"] == pytest.approx(epoch["loss"])
    assert step["memory"] > 10**7
    assert lines[-4]["top1"] == reported["result"]["top1"]
    for name in ("seconds", "step"):
        assert [line[name] for line in lines] == sorted(line[name] for line in lines)


@pytest.mark.parametrize(("done", "kept"), [(2, ["epoch", "epoch"]), (1, ["epoch"])])
def test_an_epoch_is_logged_once_though_its_last_step_was_saved_before_it_ended(
    done: int, kept: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "log.jsonl"
    with Watchers([JsonLog(path, tmp_path / "o")], NoReport, {}, pytest.fail) as watch:  # type: ignore[arg-type]
        for event in (Start(9, 3, 3), EpochEnd(1, 0.5, {"top1": 0.1}, 1.0, 3),
                      EpochEnd(2, 0.4, {"top1": 0.2}, 1.0, 6)):  # fmt: skip
            watch(event)
    with Watchers([JsonLog(path, tmp_path / "o")], NoReport, {}, pytest.fail) as watch:  # type: ignore[arg-type]
        for event in (Start(9, 3, 3), Resumed(done, 6)):
            watch(event)
    events = [line["event"] for line in lines_of(path)]
    assert events == ["start", *kept, "start", "resumed"]


def test_a_log_goes_on_where_the_run_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "o.safetensors", tmp_path / "log.jsonl"
    words = command(world, out, "--log", path, "--tensorboard", tmp_path / "board")
    stopped_in(monkeypatch, 5)
    run(*words, code=130)
    before = lines_of(path)
    assert [line["event"] for line in before[-2:]] == ["step", "interrupted"]
    assert [line["step"] for line in before[-2:]] == [5, 5]
    assert (tmp_path / "o.safetensors.run" / "curve.json").exists()
    with path.open("a") as file:
        file.write('{"event": "st')  # a kill as it wrote
    monkeypatch.undo()
    monkeypatch.setattr(engine, "EVENT_SECONDS", 0.0)
    monkeypatch.setattr(engine, "READ_SECONDS", math.inf)
    run(*words, "--resume")
    lines = lines_of(path)
    assert lines[:7] == before[:7]  # up to the checkpoint of step 3
    events = [line["event"] for line in lines[7:]]
    assert events == ["start", "resumed", *["step", "epoch", "checkpoint"] * 2, "kept", "end"]
    assert [line["step"] for line in lines if line["event"] == "step"] == [3, 6, 9]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    assert files_of(tmp_path) >= {"o.safetensors", "o.training.png"}
    assert "o.safetensors.run" not in files_of(tmp_path)
    scalars = read_board(tmp_path / "board")
    assert [step for step, _ in scalars["train/loss"]] == [3, 6, 9]
    assert [step for step, _ in scalars["validation/top1"]] == [0, 3, 6, 9]
    assert all(loss < 9 for _, loss in scalars["train/loss"])


def test_resuming_where_nothing_was_saved_begins_the_log_anew(world: World, tmp_path: Path) -> None:
    out, path = tmp_path / "o.safetensors", tmp_path / "log.jsonl"
    path.write_text('{"event": "start", "output": "o.safetensors"}\n{"event": "step", "step": 1}\n')
    run(*command(world, out, "--log", path, "--resume", "--no-picture"))
    assert [line["event"] for line in lines_of(path)].count("start") == 1


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    writer = JsonLog(path, tmp_path / "o.safetensors")
    writer.begin(Run("m", "tied", 2, 1, {"x": math.nan}, Start(1, 1, 1)))
    writer.see(Step(1, 1, (math.inf,), 0.1, 1.0, 0.0))
    writer.see(EpochEnd(1, math.nan, {}, 1.0, 1))
    writer.close(ValueError("broken"))
    start, step, epoch, failed = lines_of(path)
    assert start["x"] is step["loss"] is epoch["loss"] is epoch["top1"] is None
    assert failed["error"] == "broken"


# A disk that is full


class Full:
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        part = data[: min(len(data), self.room, 50)]
        if not part:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= len(part)
        return int(self.file.write(part))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_a_full_disk_is_reported_once_and_training_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, path = tmp_path / "o.safetensors", tmp_path / "log.jsonl"
    begin = JsonLog.begin

    def small(self: JsonLog, run: Run) -> None:
        begin(self, run)
        self._file = Full(self._file, 900)  # type: ignore[assignment]

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLog, "begin", small)
    monkeypatch.setattr(board.TensorBoard, "_add", no_space)
    monkeypatch.setattr(Course, "save", no_space)
    reported = run(*command(world, out, "--log", path, "--tensorboard", tmp_path / "b", "--json"))
    for what in (f"The log {path}", "TensorBoard's folder"):
        assert reported.stderr.count(what) == 1, reported.stderr
    assert reported.stderr.count("No space left on device") == 2
    assert json.loads(reported.stdout)["result"]["steps"] == 9
    assert out.exists()
    assert is_drawn(tmp_path / "o.training.png")
    assert len(lines_of(path)) > 2  # none of them torn


def test_a_picture_that_cannot_be_written_is_no_failure(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", broken)
    reported = run(*command(world, tmp_path / "o.safetensors", "--json"))
    assert "No picture was drawn" in reported.stderr
    assert json.loads(reported.stdout)["picture"] is None


def test_one_that_fails_does_not_stop_the_others() -> None:
    seen: list[str] = []

    class Broken(Watcher):
        what = "This"

        def see(self, event: object) -> None:
            raise OSError("gone")

    class Sound(Watcher):
        def begin(self, run: Run) -> None:
            seen.append(f"begin {run.resumed} {run.start.metrics}")

        def see(self, event: object) -> None:
            seen.append(type(event).__name__)

        def close(self, error: BaseException | None) -> None:
            seen.append(f"close {error}")

    reported: list[str] = []
    start = Start(1, 1, 1, AGREEMENT)
    with Watchers([Broken(), Sound()], NoReport, {}, reported.append) as watch:  # type: ignore[arg-type]
        for event in (Unlabelled(3), start, Resumed(2, 7), Baseline({"agreement": 0.0}, 0.0)):
            watch(event)
    assert reported == ["This can't be written: gone. The run continues without it."]
    assert seen == [f"begin {Resumed(2, 7)} {AGREEMENT}", "Resumed", "Baseline", "close None"]
    assert watchers.Watchers is Watchers


# TensorBoard


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    names = reader.Tags()["scalars"]
    return {name: [(s.step, s.value) for s in reader.Scalars(name)] for name in names}


def test_tensorboard_reads_it(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "board"
    words = command(
        world, tmp_path / "o.safetensors", "--tensorboard", folder, "--no-picture", "--force"
    )
    run(*words)
    found = read_board(folder)
    assert set(found) == {
        "train/loss", "train/learning_rate", "train/images_per_second", "train/memory_bytes",
        "epoch/loss", "validation/top1", "validation/top5",
    }  # fmt: skip
    assert [step for step, _ in found["validation/top1"]] == [0, 3, 6, 9]
    assert [step for step, _ in found["train/loss"]] == [3, 6, 9]
    run(*words)  # the former run is hidden
    assert [step for step, _ in read_board(folder)["validation/top1"]] == [0, 3, 6, 9]


def test_agreement_in_place_of_accuracy(world: World, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(
        *command(world, tmp_path / "o.safetensors", "--unlabelled", "--distill", 1),
        "--log", path, "--tensorboard", tmp_path / "b",
    )  # fmt: skip
    scalars = read_board(tmp_path / "b")
    assert "validation/top1" not in scalars
    lines = lines_of(path)
    assert lines[0]["labels"] is False
    measured = [line["agreement"] for line in lines if "agreement" in line]
    assert measured == pytest.approx([value for _, value in scalars["validation/agreement"]])
    assert len(measured) == 4
    assert is_drawn(tmp_path / "o.training.png")


# The picture


def is_drawn(path: Path) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    colours = {tuple(c) for c in pixels.reshape(-1, 3)[::7].tolist()}
    return pixels.shape[1] > 1000 and len(colours) > 20 and float((pixels < 250).mean()) > 0.005


def a_run(labelled: bool = True) -> Run:
    start = Start(9, 3, 24, ACCURACY if labelled else AGREEMENT)
    return Run("timm:$odd_name", "tied", 5_717_416, 3_060_712, {}, start)


DRAWN = list(itertools.product([1, 3, 50, 100_000], [True, False]))


@pytest.mark.parametrize(("steps", "scored"), slow_unless(DRAWN, [(1, True), (100_000, False)]))
def test_few_and_many_points_are_drawn(steps: int, scored: bool, tmp_path: Path) -> None:
    course, epoch = Course(), -(-steps // 300)
    rng = np.random.default_rng(0)
    for first in range(0, steps, 10):
        last = min(first + 10, steps)
        course.add(last, (rng.random(last - first) + 1000 / (last + 9)).tolist(), 1e-3)
    for i, last in enumerate(range(epoch, steps + 1, epoch), 1):
        course.epochs.append((i, last, 1.0))
        if scored:
            course.accuracies.append((last, 0.5 + 0.4 * last / steps))
    assert len(course.points) <= curve.MOST
    draw(course, a_run(scored), tmp_path / "p.png")
    assert is_drawn(tmp_path / "p.png")


def test_the_picture_has_a_line_for_the_teacher(tmp_path: Path) -> None:
    texts = []
    for teacher in (None, 0.875):
        course = Course(epochs=[(1, 2, 0.1)], accuracies=[(0, 0.5), (2, 0.75)], teacher=teacher)
        draw(course, a_run(), tmp_path / "p.svg", force=True)
        texts.append((tmp_path / "p.svg").read_text("utf-8"))
    assert ["teacher 87.50 %" in text for text in texts] == [False, True]


def test_a_loss_that_is_the_same_in_all_steps_is_drawn(tmp_path: Path) -> None:
    course = Course(epochs=[(1, 2, 0.0), (2, 4, 0.0)], accuracies=[(0, 1.0), (4, 1.0)])
    draw(course, a_run(), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 5000


@given(st.lists(st.floats(0, 100), min_size=1, max_size=400))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    smooth = smoothed(values)
    assert len(smooth) == len(values)
    assert min(values) - 1e-9 <= min(smooth)
    assert max(smooth) <= max(values) + 1e-9


def test_the_course_keeps_the_mean_and_survives_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "MOST", 16)
    losses = np.random.default_rng(0).random(1000).tolist()
    course = Course()
    for first in range(0, 1000, 7):
        part = losses[first : first + 7]
        course.add(first + len(part), part, 0.1)
    assert 8 <= len(course.points) <= 16
    counts = [p.count for p in course.points]
    assert sum(counts) == 1000
    assert len(set(counts[:-1])) == 1  # no part of the run is finer than another
    mean = sum(p.loss * p.count for p in course.points) / 1000
    assert mean == pytest.approx(sum(losses) / 1000)
    course.epochs, course.accuracies = [(1, 500, 0.5), (2, 1000, 0.4)], [(0, 0.1), (1000, 0.9)]
    course.teacher = 0.95
    course.save(tmp_path / "c.json")
    assert Course.load(tmp_path / "c.json") == course
    half = course.until(Resumed(1, 500))
    assert (half.epochs, half.accuracies) == ([(1, 500, 0.5)], [(0, 0.1)])
    assert half.teacher == 0.95
    # A state of the last step of an epoch may be older than the end of that epoch.
    assert course.until(Resumed(1, 1000)).accuracies == [(0, 0.1)]
    assert course.until(Resumed(1, 1000)).points == course.points
    (tmp_path / "c.json").write_text('{"points": [[1, 2]]}')
    assert Course.load(tmp_path / "c.json") == Course() == Course.load(tmp_path / "none.json")


def test_a_picture_is_where_it_was_asked_for(world: World, tmp_path: Path) -> None:
    out, there = tmp_path / "o.safetensors", tmp_path / "there.pdf"
    reported = figures(*command(world, out, "--picture", there))
    assert reported["picture"] == str(there)
    assert files_of(tmp_path) == {out.name, there.name}
    run(*command(world, tmp_path / "p.safetensors", "--no-picture"))
    assert files_of(tmp_path) == {out.name, there.name, "p.safetensors"}


def test_without_matplotlib_there_is_a_hint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "o.safetensors"
    reported = run(*command(world, out))
    assert "No picture was drawn" in reported.stderr
    assert "pip install 'tiedconv[demo]'" in reported.stderr
    assert files_of(tmp_path) == {out.name}
    refused(
        *command(world, tmp_path / "p.safetensors", "--picture", "p.png"),
        error_code="missing-extra",
        words=["matplotlib"],
    )


# Options


def test_options_are_refused_before_any_work(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/events.out.tfevents.1").touch()
    Path("old.jsonl").write_text('{"event": "start", "output": "other.safetensors"}\n')
    Path("other.training.png").touch()
    for options, code, words in (
        ("--log none/log.jsonl", "output-folder-missing", ["none", "--log"]),
        ("--log full", "output-is-folder", ["full"]),
        ("--log old.jsonl", "output-exists", ["old.jsonl", "--force"]),
        ("--log old.jsonl --resume", "log-of-another-run", ["o.safetensors"]),
        ("--log o.safetensors", "output-paths-collide", []),
        ("--tensorboard full", "log-of-another-run", ["full", "--force"]),
        ("--tensorboard old.jsonl", "log-not-writable", ["old.jsonl", "--tensorboard"]),
        ("--picture p.png --no-picture", "options-conflict", ["--picture", "--no-picture"]),
        ("--picture p.gif", "unknown-picture-format", ["p.gif", ".png"]),
        ("--picture none/p.png", "output-folder-missing", ["none", "--picture"]),
        ("--picture other.training.png", "output-exists", ["other.training.png", "--force"]),
        ("-o other.safetensors", "output-exists", ["other.training.png"]),
    ):
        before = files_of(tmp_path)
        refused(
            *command(world, Path("o.safetensors")), *options.split(), error_code=code, words=words
        )
        assert files_of(tmp_path) == before
    assert Path("old.jsonl").read_text().count("\n") == 1


def test_a_log_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.jsonl"
    path.touch()

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with raises(OutputError, "log-not-writable", "Permission denied", "log"):
        JsonLog(path, tmp_path / "o").check(force=True, resume=False)


def test_without_tensorboard_it_says_what_to_install(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(
        *command(world, tmp_path / "o.safetensors", "--tensorboard", tmp_path / "b"),
        error_code="missing-extra",
        words=["--tensorboard", "'tiedconv[tensorboard]'"],
    )
    assert files_of(tmp_path) == set()


# The progress line


def test_where_no_bar_is_drawn_a_line_says_now_and_then_how_far_it_is(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, said in ((0.0, True), (60.0, False)):
        monkeypatch.setattr(progress, "LINE_SECONDS", seconds)
        reported = run(*command(world, tmp_path / f"{seconds}.safetensors")).stderr
        assert ("step 9/9  epoch 3/3  loss " in reported) == said


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_progress_line_says_how_far_it_is(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(
        force_terminal=True, width=width, record=True, file=io.StringIO(), _environ={}
    )  # fmt: skip
    monkeypatch.setattr(progress, "err", console)
    monkeypatch.setattr(progress, "memory_in_use", lambda: 345_000_000)
    with progress.TrainingBar() as bar:
        bar(Start(125_100, 300, 25_600))
        console.export_text(clear=True)
        bar(Step(212, 64_000, (0.5, 0.7), 3e-4, 1234.5, 37_230.0))
        bar._progress.refresh()
        shown = plain(console.export_text(clear=True))
        bar(EvalStep(500, 1000, 250.0))
        bar._progress.refresh()
        evaluating = plain(console.export_text())
    parts = ["64000/125100", "epoch 212/300", "loss 0.600", "10:20:30 left"]
    parts += ["1,234 images/s", "lr 3.0e-04", "345.00 MB"] if width == 140 else []
    for part in parts:
        assert part in shown, (part, shown)
    assert "\u2026" not in shown  # nothing is cut short
    assert "0:00:02 left" in evaluating


def test_memory_is_reported_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (memory_in_use() or 0) > 10**7
    monkeypatch.setattr(memory, "_STATM", Path("/none"))
    most = memory_in_use()
    assert most is None or most > 10**7
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory_in_use() is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 10 * (device + 1))
    assert memory_in_use() == 30
