"""What can't be done: one line that says why and what to do, exit code 2, nothing written."""

from __future__ import annotations

import shutil
import sys
import tempfile
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import (
    MODEL_ARGS,
    QUICK,
    SPEC,
    World,
    figures,
    files_of,
    refused,
    run,
    write_images,
)
from safetensors.torch import load_file, save_file

from tiedconv.training import engine, train_step


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder in which a test must leave no more than it put there itself."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert files_of(folder) == set()


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("resnt50", "unknown-model", ["'resnt50'", "Similar names: resnet50"]),
        ("nothing_like_it", "unknown-model", ["'nothing_like_it'"]),
        (
            "timm:vit_tinny_patch16_224",
            "unknown-model",
            ["Similar names: timm:vit_tiny_patch16_224"],
        ),
        ("hf:no/such-model", "model-not-loaded", ["no/such-model"]),
        ("no_such_module:net", "module-not-imported", ["no_such_module"]),
        (
            "tiedconv.commands.demo:digits_vitt",
            "unknown-function",
            ["no function digits_vitt", "digits_vit"],
        ),
        ("model.pth", "file-as-model", ["--weights FILE"]),
        ("resnet50 --scheme tide", "unknown-scheme", ["'tide'"]),
        ("resnet50 --scheme lors --option rnk=3", "unknown-option", ["'rnk'"]),
        ("resnet50 --option groups", "option-without-value", ["'groups'", "--option groups=all"]),
        ("resnet50 --scheme tied --option groups=some", "invalid-groups", ["'some'"]),
        ("resnet50 --scheme tied --option first=never", "unknown-choice", ["'never'"]),
        ("resnet50 --scheme tied --option scale=3", "wrong-option-type", ["scale=3"]),
        ("resnet50 --scheme tied --rank many", "wrong-option-type", ["rank='many'"]),
        ("resnet50 --scheme tied --rank -4", "invalid-rank", ["-4"]),
        ("resnet50 --rank 1.5", "invalid-rank", ["1.5"]),
        ("resnet50 --params half", "budget-invalid", ["'half'", "50%"]),
        ("resnet50 --params 0%", "budget-invalid", ["'0%'", "50%"]),
        ("resnet50 --params 150%", "budget-invalid", ["'150%'", "50%"]),
        ("resnet50 --params=", "budget-invalid", ["''", "50%"]),
        ("resnet50 --scheme tied --params 10%", "budget-too-small", ["10%", "18,296,616 (71.6 %)"]),
        (
            "resnet50 --scheme lors --params 1000",
            "budget-too-small",
            ["1,000", "85,091 (0.3 %)"],
        ),
        ("resnet50 --include nothing*", "nothing-to-convert", ["--include"]),
        ("resnet18 --scheme tied", "nothing-to-convert", ["--scheme lowrank"]),
        ("resnet50 --model-arg width", "malformed-model-argument", ["img_size=32"]),
        ("resnet50 --model-arg wdth=3", "unknown-model-argument", []),
        ("resnet50 --mean 1,2", "invalid-mean-or-std", ["--mean", "0.485,0.456,0.406"]),
        ("resnet50 --mean a,b,c", "invalid-mean-or-std", ["--mean", "0.485,0.456,0.406"]),
        (
            "resnet50 --mean 123,117,104",
            "invalid-mean-or-std",
            ["--mean", "between 0 and 1", "255"],
        ),
        ("resnet50 --std 0,0,0", "invalid-mean-or-std", ["--std", "between 0 and 1"]),
        ("resnet50 --std nan", "invalid-mean-or-std", ["--std", "0.485,0.456,0.406"]),
        ("resnet50 --params 100%", "budget-saves-nothing", ["100%"]),
        ("resnet50 --scheme lors --rank 2 --params 50%", "rank-and-budget", []),
        ("resnet50 --effort fast", "needs-calib", ["--effort", "--calib"]),
        ("resnet50 -n 100", "needs-calib", ["--calib-images", "--calib"]),
        ("resnet50 --strict", "needs-calib", ["--strict", "--calib"]),
        ("resnet50 --scheme tied --option base_rank=-1", "invalid-rank", ["base_rank=-1"]),
        ("resnet50 --interpolation cubic", "unknown-interpolation", []),
        ("resnet50 --weights missing.pth", "weights-unreadable", []),
        ("resnet50 --recipe missing.toml", "recipe-unreadable", []),
        (
            "resnet50 --recipe missing.toml --rank 3",
            "recipe-and-options",
            ["--rank", "file's rules"],
        ),
        (
            "resnet50 --recipe missing.toml --scheme lors",
            "recipe-and-options",
            ["--scheme", "file's rules"],
        ),
    ],
)
def test_convert_refuses(arguments: str, code: str, words: list[str], here: Path) -> None:
    refused("convert", *arguments.split(), error_code=code, words=words)
    if "--weights" not in arguments:
        refused("convert", *arguments.split(), "--dry-run", "--json", error_code=code, words=words)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("[[rule]\n", "recipe-unreadable", ["can't be read", "docs/recipes.md"]),
        ("", "recipe-malformed", []),
        ("[rule]\nscheme = 'tied'", "recipe-malformed", []),
        ("parms = '50%'\n[[rule]]", "recipe-malformed", ["'parms'"]),
        ("[[rule]]\nscheme = 'lors'\nrnak = 3", "unknown-option", ["'rnak'"]),
        ("[[rule]]\ninclude = 3", "patterns-invalid", ["include=3"]),
        ("rule = [3]", "recipe-malformed", []),
        ("params = true\n[[rule]]", "budget-invalid", ["50%"]),
    ],
)
def test_a_recipe_that_makes_no_sense(
    text: str, code: str, words: list[str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    refused("convert", "resnet50", "--recipe", recipe, "--dry-run", error_code=code, words=words)


def test_a_budget_beyond_reach_names_ways_that_reach_it(here: Path) -> None:
    line = refused(
        "convert", "resnet50", "--scheme", "tied", "--params", "50%",
        error_code="budget-too-small",
    )  # fmt: skip
    assert "--scheme tied --option groups=all --option first=expand --option spatial=true" in line
    assert "7,828,968 (30.6 %)" in line


def test_a_compact_file_is_no_model_to_convert(world: World, here: Path) -> None:
    refused("convert", world.tied, error_code="already-compact")
    refused("convert", world.weights, error_code="file-as-model", words=["--weights"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(
        "convert",
        SPEC,
        "--dry-run",
        error_code="missing-extra",
        words=["pip install 'tiedconv[timm]'"],
    )


def test_no_network(monkeypatch: pytest.MonkeyPatch, here: Path, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    # Before it comes torch's line that a download begins.
    line = run("convert", "resnet50", code=2).stderr.splitlines()[-1]
    assert line.startswith("error: ")
    assert "no route to host" in line
    assert "--weights FILE" in line
    assert "--weights none" in line
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images" / "all")
    result = run("evaluate", "resnet50", "--data", tmp_path / "images" / "all", code=2)
    assert "--weights FILE" in result.stderr.splitlines()[-1]


# Weights


class Code:
    """Asks to be unpickled by running a command."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch ran",)


def test_weights_that_can_not_be_used(world: World, here: Path, tmp_path: Path) -> None:
    def convert(weights: Path, code: str, *words: str) -> None:
        command = ("convert", SPEC, *MODEL_ARGS, "--weights", weights)
        refused(*command, error_code=code, words=words)

    torch.save({"state_dict": load_file(world.weights), "x": Code()}, tmp_path / "code.pth")
    convert(tmp_path / "code.pth", "weights-contain-code")

    whole = world.pickle.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    convert(tmp_path / "cut.pth", "weights-damaged")
    whole = world.weights.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    convert(tmp_path / "cut.safetensors", "weights-damaged")
    (tmp_path / "text.pth").write_text("hello")
    convert(tmp_path / "text.pth", "weights-format-unknown")
    convert(tmp_path, "weights-not-found")
    convert(world.tied, "weights-are-compact", "tiedconv export")

    other = load_file(world.weights)
    other["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    other["blocks.1.attn.proj.bias"] = torch.zeros(7)
    save_file(other, tmp_path / "other.safetensors")
    convert(
        tmp_path / "other.safetensors",
        "weights-mismatch",
        "blocks.0.mlp.fc1.weight is (3, 3) in the file, (128, 32) in the model",
        "blocks.1.attn.proj.bias is (7,) in the file, (32,) in the model",
    )
    del other["blocks.0.mlp.fc1.weight"], other["blocks.1.attn.proj.bias"]
    save_file(other, tmp_path / "fewer.safetensors")
    convert(tmp_path / "fewer.safetensors", "weights-mismatch", "blocks.0.mlp.fc1.weight")
    refused(
        "convert",
        SPEC,
        "--weights",
        world.weights,
        error_code="weights-mismatch",
        words=["pos_embed is (1, 17, 32) in the file"],
    )
    refused(
        "convert", SPEC, *MODEL_ARGS[:-1], "num_classes=5", "--weights", world.weights,
        error_code="weights-mismatch", words=["--model-arg num_classes=3"],
    )  # fmt: skip


# Compact files


def _commands(world: World, file: Path) -> dict[str, tuple[object, ...]]:
    return {
        "report": ("report", file),
        "verify": ("verify", file),
        "evaluate": ("evaluate", file, "--data", world.data),
        "finetune": ("finetune", file, "--data", world.data, "-o", "out.safetensors"),
        "export": ("export", file, "-o", "out.safetensors"),
    }


@pytest.mark.parametrize("command", ["report", "verify", "evaluate", "finetune", "export"])
def test_files_that_can_not_be_used(command: str, world: World, here: Path, tmp_path: Path) -> None:
    def check(file: Path, code: str, *words: str) -> None:
        refused(*_commands(world, file)[command], words=words, error_code=code)

    whole = world.tied.read_bytes()
    bad = tmp_path / "bad.safetensors"
    check(tmp_path / "missing.safetensors", "file-not-found", "missing.safetensors")
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])
        check(bad, "file-damaged", str(bad))
    bad.write_bytes(whole + b"more")
    check(bad, "file-damaged", str(bad))
    head = 8 + int.from_bytes(whole[:8], "little")
    for place, code in (
        (20, "file-damaged"),
        (whole.index(b"sha256", 0, head) + 20, "plan-damaged"),
    ):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        bad.write_bytes(flipped)
        check(bad, code, str(bad))
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    bad.write_bytes(flipped)
    if command == "report":  # it reads the head alone, as its help says
        run("report", bad)
    else:
        check(bad, "tensor-damaged", str(bad))
    check(world.weights, "not-compact-file", "--weights")
    bad.write_text("hello")
    check(bad, "file-damaged", str(bad))
    if command != "evaluate":  # there a folder is taken for the name of a model
        check(tmp_path, "file-not-found", str(tmp_path))


# Which of them depends on where the bit lies: the length, the JSON, the plan or its digest.
HEAD_DAMAGED = ("file-damaged", "plan-damaged", "metadata-invalid")


def test_every_flipped_bit_of_the_head_is_noticed(world: World, tmp_path: Path) -> None:
    whole = world.tied.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    bad = tmp_path / "bad.safetensors"
    for place in range(0, length, length // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        bad.write_bytes(flipped)
        refused("verify", bad, error_code=HEAD_DAMAGED, words=[str(bad)])


# Images


def test_data_folders_that_can_not_be_used(
    world: World, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(data: Path, code: str, *words: str) -> None:
        refused("evaluate", world.tied, "--data", data, error_code=code, words=words)
        refused(
            "finetune", world.tied, "--data", data, "-o", "out.safetensors", "--teacher", "none",
            error_code=code, words=words,
        )  # fmt: skip

    check(tmp_path / "missing", "no-data-folder", "ROOT/train/CLASS")
    check(world.tied, "no-data-folder", "ROOT/train/CLASS")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "no-images", "ROOT/train/CLASS")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    check(tmp_path / "bare", "no-images", "ROOT/train/CLASS")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", denied)
    check(world.data, "data-unreadable", "permissions")
    monkeypatch.undo()  # pytest cleans up with it


def test_more_classes_than_outputs(world: World, here: Path, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    for part in ("train", "val"):
        shutil.copytree(data / part / "red", data / part / "violet")
    words = ["4 classes", "3 outputs", "the model was made for"]
    refused(
        "evaluate",
        world.tied,
        "--data",
        data,
        "--workers",
        0,
        error_code="classes-mismatch",
        words=words,
    )
    command = ("finetune", world.tied, "--data", data, "-o", "out.safetensors", *QUICK)
    result = run(*command, "--teacher", "none", code=2)
    assert all(word in result.stderr.splitlines()[-1] for word in words)


def test_a_broken_image_is_skipped_and_counted_or_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    for part in ("train", "val"):
        picture = data / part / "blue" / "0.png"
        picture.write_bytes(picture.read_bytes()[:60])
    evaluate = ("evaluate", world.tied, "--data", data, "--workers", 0)
    assert "1 image could not be read and was skipped" in run(*evaluate).stdout
    result = figures(*evaluate)["result"]
    assert (result["images"], result["skipped"]) == (11, 1)
    assert result["example_of_skipped"].endswith("val/blue/0.png")
    refused(
        *evaluate,
        "--strict",
        error_code="image-unreadable",
        words=["blue/0.png", "leave --strict out"],
    )

    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    finetune = (
        "finetune", world.tied, "--data", data, "-o", "out.safetensors", *QUICK, "--teacher",
        "none",
    )  # fmt: skip
    assert run(*finetune, "--strict", code=2).stderr.splitlines()[-1].startswith("error: The image")
    assert files_of(here) == set()
    done = run(*finetune)
    assert "2 images could not be read and were skipped" in done.stdout
    assert "skipped 1 image that can't be read: " in done.stderr


# Training


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ("--epochs 1 --steps 2", "options-conflict", ["--epochs and --steps"]),
        ("--epochs 0", "invalid-training-option", ["more than 0"]),
        ("--steps 0", "invalid-training-option", ["1 or more"]),
        ("--batch-size 0", "invalid-batch-size", ["--batch-size 0", "1 or more"]),
        ("--lr -1", "invalid-training-option", ["more than 0"]),
        ("--optimizer lion", "invalid-training-option", ["'lion'"]),
        ("--augment all", "invalid-training-option", ["'all'"]),
        ("--distill 2", "invalid-training-option", ["at most 1"]),
        ("--distillation warm", "invalid-training-option", ["'warm'"]),
        ("--distillation hard --teacher none", "teacher-missing", []),
        ("--features 1 --teacher none", "teacher-missing", ["features is 1"]),
        ("--ema 1", "invalid-training-option", ["ema is 1.0", "less than 1"]),
        ("--layer-decay 0", "invalid-training-option", ["layer_decay", "more than 0"]),
        ("--erasing 2", "invalid-training-option", ["at most 1"]),
        ("--mixup -1", "invalid-training-option", ["0 or more"]),
        ("--val-split 2", "invalid-val-fraction", ["2", "between 0 and 1"]),
        ("--limit 0", "invalid-limit", ["1 or more"]),
        ("--device tpu", "unknown-device", []),
        ("--device cuda:77", "device-missing", ["cuda:77"]),
        ("--teacher auto", "original-unavailable", ["--teacher none"]),
        ("--teacher missing.pth", "weights-unreadable", []),
        ("--teacher resnt50", "unknown-model", ["Similar names: resnet50"]),
        ("--interpolation cubic", "unknown-interpolation", []),
    ],
)
def test_finetune_refuses(
    options: str, code: str, words: list[str], world: World, here: Path
) -> None:
    command = ["finetune", world.tied, "--data", world.data, "-o", "out.safetensors", "--workers",
               0]  # fmt: skip
    if "--teacher" not in options:
        command += ["--teacher", "none"]
    refused(*command, *options.split(), error_code=code, words=words)


def test_resuming_another_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "finetune", world.tied, "--data", world.data, "-o", tmp_path / "out.safetensors", *QUICK,
        "--teacher", "none", "--epochs", 2, "--no-picture",
    )  # fmt: skip
    take = engine._Run.take

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.at.epoch == 2:
            raise KeyboardInterrupt
        return take(self, *arguments)

    monkeypatch.setattr(engine._Run, "take", interrupted)
    run(*command, code=130)
    monkeypatch.undo()
    folder = tmp_path / "out.safetensors.run"
    kept = (folder / "step-000000003.safetensors").read_bytes()
    other = tmp_path / "other"
    shutil.copytree(world.data, other)
    for image in (other / "train").rglob("*.*"):
        image.rename(image.with_name(f"other-{image.name}"))
    for changed, words in (
        (("--lr", "0.1"), "lr None -> 0.1"),
        (("--teacher", world.weights), "teacher's weights none -> "),
        (("--mean", "0.1,0.1,0.1"), "preprocessing "),
        (("--data", other), "training data "),
    ):
        line = refused(
            *command, *changed, "--resume", error_code="state-of-other-run", words=[words]
        )
        assert "Resuming would mix the two" in line
    renamed = tmp_path / "model.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", "none", "--seed", "3", "-o", renamed)
    refused("finetune", renamed, *command[2:], "--resume", error_code="state-of-other-run")
    # A new run does not take the place of the old one, unless it is told to.
    refused(*command, error_code="run-interrupted", words=["step-000000003", "--resume", "--force"])
    assert (folder / "step-000000003.safetensors").read_bytes() == kept
    (folder / "notes.md").write_text("mine")
    monkeypatch.setattr(engine._Run, "take", interrupted)
    run(*command, "--force", "--lr", "0.01", code=130)
    monkeypatch.undo()
    assert (folder / "step-000000003.safetensors").read_bytes() != kept
    run(*command, "--resume", "--lr", "0.01")
    # Only what is of the run goes with it.
    assert files_of(folder) == {"notes.md"}


def test_resuming_what_was_never_begun(world: World, tmp_path: Path) -> None:
    result = run(
        "finetune", world.tied, "--data", world.data, "-o", tmp_path / "out.safetensors", *QUICK,
        "--teacher", "none", "--no-picture", "--resume",
    )  # fmt: skip
    assert "no checkpoint" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("convert", SPEC, "-o", "bad.safetensors"),
        ("convert", SPEC, "-o", "bad.safetensors", "--dry-run"),
        ("convert", SPEC, "-o", "bad.safetensors", "--calib", "IMAGES"),
        ("plan", SPEC, "--calib", "IMAGES"),
        ("sensitivity", SPEC, "--calib", "IMAGES"),
    ],
    ids=" ".join,
)
def test_a_size_that_cannot_be_converted_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(world.data) if word == "IMAGES" else word for word in words]
    more = (*MODEL_ARGS, "--weights", "none", "--image-size", "48")
    refused(*given, *more, error_code="images-rejected", words=["48 x 48 pixels"])
    assert not files_of(tmp_path)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--batch-size", "auto")])
def test_a_size_that_the_model_cannot_take(world: World, tmp_path: Path, more: Any) -> None:
    output = tmp_path / "out.safetensors"
    line = refused(
        "finetune", world.tied, "--data", world.data, "-o", output, *QUICK, "--teacher", "none",
        "--image-size", "48", *more,
        error_code="images-rejected", words=["48 x 48", "--image-size"],
    )  # fmt: skip
    assert "AssertionError" in line
    assert not files_of(tmp_path)
    refused(
        "evaluate", world.tied, "--data", world.data, *QUICK, "--image-size", "48",
        error_code="images-rejected", words=["48 x 48", "--image-size"],
    )  # fmt: skip


def test_a_teacher_that_no_longer_exists(world: World, here: Path, tmp_path: Path) -> None:
    """A model of random weights has no teacher; it is trained without one."""
    file = tmp_path / "random.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", "none", "-o", file)
    out = tmp_path / "out.safetensors"
    done = run("finetune", file, "--data", world.data, "-o", out, "--steps", 1, *QUICK)
    assert "teacher none" in done.stdout


# Outputs


def _writers(world: World, output: str) -> list[tuple[object, ...]]:
    return [
        ("convert", SPEC, *MODEL_ARGS, "--weights", "none", "-o", output),
        ("finetune", world.tied, "--data", world.data, "--teacher", "none", *QUICK, "-o", output),
        ("export", world.tied, "-o", output),
    ]


def test_outputs_that_can_not_be_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = files_of(tmp_path)
    for command in _writers(world, "there.safetensors"):
        refused(*command, error_code="output-exists", words=["--force"])
    for command in _writers(world, "folder.safetensors"):
        refused(*command, error_code="output-is-folder")
        refused(*command, "--force", error_code="output-is-folder")
    for command in _writers(world, "no/such/place.safetensors"):
        refused(
            *command,
            error_code="output-folder-missing",
            words=["The folder no/such does not exist"],
        )
    for command in _writers(world, "there.safetensors/below.safetensors"):
        refused(*command, error_code="output-folder-missing")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    for command in _writers(world, "out.safetensors"):
        refused(*command, error_code="folder-not-writable")
    assert files_of(tmp_path) == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_an_export_needs_a_known_form_and_ending(world: World, here: Path) -> None:
    refused("export", world.tied, "-o", "out.bin", error_code="format-not-named")
    refused("export", world.tied, "-o", "out.pth", "--to", "onnx", error_code="extension-mismatch")


def test_a_full_disk_leaves_what_was_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.safetensors").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    for command in (_writers(world, "out.safetensors")[0], _writers(world, "out.safetensors")[2]):
        refused(*command, "--force", error_code="output-not-written")
    assert files_of(tmp_path) == {"out.safetensors"}
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_a_disk_that_fills_while_safetensors_writes(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiedconv.io.safetensors_file.write_all", full)
    for command in _writers(world, "out.safetensors")[::2]:
        refused(*command, error_code="output-not-written")


def test_an_interruption_leaves_nothing_half_written(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    convert, finetune, export = _writers(world, "out.safetensors")
    monkeypatch.setattr("tiedconv.io.safetensors_file.write_all", interrupted)
    for command in (convert, export):
        assert run(*command, code=130).stderr.startswith("Interrupted")
    monkeypatch.setattr("tiedconv.conversion.stages.fit_factors", interrupted)
    assert "Traceback" not in run(*convert, code=130).output
    monkeypatch.setattr(engine._Run, "take", interrupted)
    result = run(*finetune, code=130)
    assert "Traceback" not in result.output
    assert "--resume" not in result.stderr  # no epoch was finished


def test_a_failed_training_is_no_mistake_of_the_users(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor(float("nan"))

    monkeypatch.setattr(train_step.TrainStep, "step", diverges)
    result = run(*_writers(world, "out.safetensors")[1], code=1)
    assert result.stderr.splitlines()[-1].startswith("error: The loss")
