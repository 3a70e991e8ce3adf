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
    ("arguments", "words"),
    [
        ("resnt50", ["'resnt50'", "Similar names: resnet50"]),
        ("nothing_like_it", ["'nothing_like_it'", "timm:NAME"]),
        ("timm:vit_tinny_patch16_224", ["Similar names: timm:vit_tiny_patch16_224"]),
        ("hf:no/such-model", ["no/such-model"]),
        ("no_such_module:net", ["no_such_module", "Python can import it"]),
        ("tiedconv.commands.demo:digits_vitt", ["no function digits_vitt", "digits_vit"]),
        ("model.pth", ["name of a file", "--weights FILE"]),
        ("resnet50 --scheme tide", ["'tide'", "Did you mean tied?", "lors"]),
        ("resnet50 --scheme lors --option rnk=3", ["'rnk'", "rank"]),
        ("resnet50 --option groups", ["'groups'", "--option groups=all"]),
        ("resnet50 --option groups=some", ["groups", "'some'", "adjacent:N"]),
        ("resnet50 --option first=never", ["'never'", "keep, slice, expand"]),
        ("resnet50 --option scale=3", ["scale=3", "bool"]),
        ("resnet50 --rank many", ["rank='many'", "number"]),
        ("resnet50 --rank -4", ["rank", "-4"]),
        ("resnet50 --rank 1.5", ["rank", "1.5"]),
        ("resnet50 --params half", ["'half'", "50%"]),
        ("resnet50 --params 0%", ["'0%'", "50%"]),
        ("resnet50 --params 150%", ["'150%'", "50%"]),
        ("resnet50 --params=", ["''", "50%"]),
        ("resnet50 --params 10%", ["10%", "18,296,616 (71.6 %)", "Ask for that or more"]),
        ("resnet50 --scheme lors --params 1000", ["1,000", "2,139,240 (8.4 %)"]),
        ("resnet50 --include nothing*", ["Nothing in this model can be converted", "--include"]),
        ("resnet18", ["Nothing in this model can be converted", "--scheme lowrank"]),
        ("resnet50 --model-arg width", ["width", "img_size=32"]),
        ("resnet50 --model-arg wdth=3", ["wdth", "argument"]),
        ("resnet50 --mean 1,2", ["--mean", "0.485,0.456,0.406"]),
        ("resnet50 --mean a,b,c", ["--mean", "0.485,0.456,0.406"]),
        ("resnet50 --mean 123,117,104", ["--mean", "between 0 and 1", "255"]),
        ("resnet50 --std 0,0,0", ["--std", "between 0 and 1"]),
        ("resnet50 --std nan", ["--std", "0.485,0.456,0.406"]),
        ("resnet50 --params 100%", ["100%", "Nothing would be saved"]),
        ("resnet50 --scheme lors --rank 2 --params 50%", ["rank", "lors", "budget"]),
        ("resnet50 --effort fast", ["--effort", "--calib"]),
        ("resnet50 -n 100", ["--calib-images", "--calib"]),
        ("resnet50 --strict", ["--strict", "--calib"]),
        ("resnet50 --scheme tied --option base_rank=-1", ["base_rank=-1"]),
        ("resnet50 --interpolation cubic", ["cubic", "bilinear or bicubic"]),
        ("resnet50 --weights missing.pth", ["missing.pth", "path of a readable file"]),
        ("resnet50 --recipe missing.toml", ["missing.toml", "TOML"]),
        ("resnet50 --recipe missing.toml --rank 3", ["--rank", "file's rules"]),
        ("resnet50 --recipe missing.toml --scheme lors", ["--scheme", "file's rules"]),
    ],
)
def test_convert_refuses(arguments: str, words: list[str], here: Path) -> None:
    refused("convert", *arguments.split(), words=words)
    if "--weights" not in arguments:
        refused("convert", *arguments.split(), "--dry-run", "--json", words=words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[rule]\n", ["can't be read", "docs/recipes.md"]),
        ("", ["no [[rule]]"]),
        ("[rule]\nscheme = 'tied'", ["no [[rule]]"]),
        ("parms = '50%'\n[[rule]]", ["'parms'", "params"]),
        ("[[rule]]\nscheme = 'lors'\nrnak = 3", ["'rnak'", "rank"]),
        ("[[rule]]\ninclude = 3", ["include=3", "*attn*"]),
        ("rule = [3]", ["rule"]),
        ("params = true\n[[rule]]", ["True", "50%"]),
    ],
)
def test_a_recipe_that_makes_no_sense(text: str, words: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(text)
    refused("convert", "resnet50", "--recipe", recipe, "--dry-run", words=words)


def test_a_budget_beyond_reach_names_ways_that_reach_it(here: Path) -> None:
    line = refused("convert", "resnet50", "--params", "50%")
    assert "--scheme tied --option groups=all --option first=expand --option spatial=true" in line
    assert "7,828,968 (30.6 %)" in line


def test_a_compact_file_is_no_model_to_convert(world: World, here: Path) -> None:
    refused("convert", world.tied, words=["compact file already", "tiedconv finetune"])
    refused("convert", world.weights, words=["name of a file", "--weights"])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    refused("convert", SPEC, "--dry-run", words=["timm", "pip install 'tiedconv[timm]'"])


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
    def convert(weights: Path, *words: str) -> None:
        refused("convert", SPEC, *MODEL_ARGS, "--weights", weights, words=words)

    torch.save({"state_dict": load_file(world.weights), "x": Code()}, tmp_path / "code.pth")
    convert(tmp_path / "code.pth", "would run code", "safetensors")

    whole = world.pickle.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    convert(tmp_path / "cut.pth", "damaged", "again")
    whole = world.weights.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    convert(tmp_path / "cut.safetensors", "damaged", "again")
    (tmp_path / "text.pth").write_text("hello")
    convert(tmp_path / "text.pth", "not a weights file")
    convert(tmp_path, "can't be read")
    convert(world.tied, "compact file", "tiedconv export")

    other = load_file(world.weights)
    other["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    other["blocks.1.attn.proj.bias"] = torch.zeros(7)
    save_file(other, tmp_path / "other.safetensors")
    convert(
        tmp_path / "other.safetensors",
        "blocks.0.mlp.fc1.weight is (3, 3) in the file, (128, 32) in the model",
        "blocks.1.attn.proj.bias is (7,) in the file, (32,) in the model",
        "model arguments",
    )
    del other["blocks.0.mlp.fc1.weight"], other["blocks.1.attn.proj.bias"]
    save_file(other, tmp_path / "fewer.safetensors")
    convert(tmp_path / "fewer.safetensors", "lacks blocks.0.mlp.fc1.weight")
    refused(
        "convert", SPEC, "--weights", world.weights, words=["pos_embed is (1, 17, 32) in the file"]
    )
    refused(
        "convert", SPEC, *MODEL_ARGS[:-1], "num_classes=5", "--weights", world.weights,
        words=["--model-arg num_classes=3"],
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


def test_every_flipped_bit_of_the_head_is_noticed(world: World, tmp_path: Path) -> None:
    whole = world.tied.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    bad = tmp_path / "bad.safetensors"
    for place in range(0, length, length // 40):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        bad.write_bytes(flipped)
        refused("verify", bad, words=[str(bad)])


# Images


def test_data_folders_that_can_not_be_used(
    world: World, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(data: Path, *words: str) -> None:
        refused("evaluate", world.tied, "--data", data, words=words)
        refused(
            "finetune", world.tied, "--data", data, "-o", "out.safetensors", "--teacher", "none",
            words=words,
        )  # fmt: skip

    check(tmp_path / "missing", "does not exist", "ROOT/train/CLASS")
    check(world.tied, "is a file, not a folder", "ROOT/train/CLASS")
    (tmp_path / "empty").mkdir()
    check(tmp_path / "empty", "no class folders", "ROOT/train/CLASS")
    (tmp_path / "bare" / "cat").mkdir(parents=True)
    check(tmp_path / "bare", "no images", "ROOT/train/CLASS")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", denied)
    check(world.data, "can't be read (Permission denied)", "permissions")
    monkeypatch.undo()  # pytest cleans up with it


def test_fewer_classes_than_outputs_are_told_once(world: World, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    for part in ("train", "val"):
        shutil.rmtree(data / part / "red")
    words = "the data have 2 classes and the model 3 outputs"
    assert words in run("evaluate", world.tied, "--data", data, "--workers", 0).stderr
    assert words not in run("evaluate", world.tied, "--data", world.data, "--workers", 0).stderr
    command = ("finetune", world.tied, "--data", data, "-o", tmp_path / "out.safetensors", *QUICK)
    assert run(*command, "--teacher", "none").stderr.count(words) == 1


def test_more_classes_than_outputs(world: World, here: Path, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(world.data, data)
    for part in ("train", "val"):
        shutil.copytree(data / part / "red", data / part / "violet")
    words = ["4 classes", "3 outputs", "the model was made for"]
    refused("evaluate", world.tied, "--data", data, "--workers", 0, words=words)
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
    refused(*evaluate, "--strict", words=["blue/0.png", "leave --strict out"])

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
    ("options", "words"),
    [
        ("--epochs 1 --steps 2", ["--epochs and --steps", "one of them"]),
        ("--epochs 0", ["epochs", "more than 0"]),
        ("--steps 0", ["steps", "1 or more"]),
        ("--batch-size 0", ["--batch-size 0", "1 or more"]),
        ("--lr -1", ["lr", "more than 0"]),
        ("--optimizer lion", ["'lion'", "adamw"]),
        ("--augment all", ["'all'", "randaugment"]),
        ("--distill 2", ["distill", "at most 1"]),
        ("--distillation warm", ["'warm'", "soft, hard"]),
        ("--distillation hard --teacher none", ["distillation is hard", "no teacher"]),
        ("--features 1 --teacher none", ["features is 1", "no teacher"]),
        ("--ema 1", ["ema is 1.0", "less than 1"]),
        ("--layer-decay 0", ["layer_decay", "more than 0"]),
        ("--erasing 2", ["erasing", "at most 1"]),
        ("--mixup -1", ["mixup", "0 or more"]),
        ("--val-split 2", ["2", "between 0 and 1"]),
        ("--limit 0", ["limit", "1 or more"]),
        ("--device tpu", ["tpu"]),
        ("--device cuda:77", ["cuda:77"]),
        ("--teacher auto", ["tiny.safetensors", "--teacher none"]),
        ("--teacher missing.pth", ["missing.pth", "readable file"]),
        ("--teacher resnt50", ["Similar names: resnet50"]),
        ("--interpolation cubic", ["bilinear or bicubic"]),
    ],
)
def test_finetune_refuses(options: str, words: list[str], world: World, here: Path) -> None:
    command = ["finetune", world.tied, "--data", world.data, "-o", "out.safetensors", "--workers",
               0]  # fmt: skip
    if "--teacher" not in options:
        command += ["--teacher", "none"]
    refused(*command, *options.split(), words=words)


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
        (("--lr", "0.1"), "lr 0.0005 -> 0.1"),
        (("--teacher", world.weights), "teacher's weights none -> "),
        (("--mean", "0.1,0.1,0.1"), "preprocessing "),
        (("--data", other), "training data "),
    ):
        line = refused(*command, *changed, "--resume", words=[words])
        assert "Resuming would mix the two" in line
    renamed = tmp_path / "model.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", "none", "--seed", "3", "-o", renamed)
    refused("finetune", renamed, *command[2:], "--resume", words=["model "])
    # A new run does not take the place of the old one, unless it is told to.
    refused(*command, words=["step-000000003", "--resume", "--force"])
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
    refused(*given, *more, words=["48 x 48 pixels"])
    assert not files_of(tmp_path)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--batch-size", "auto")])
def test_a_size_that_the_model_cannot_take(world: World, tmp_path: Path, more: Any) -> None:
    output = tmp_path / "out.safetensors"
    line = refused(
        "finetune", world.tied, "--data", world.data, "-o", output, *QUICK, "--teacher", "none",
        "--image-size", "48", *more, words=["48 x 48", "--image-size"],
    )  # fmt: skip
    assert "AssertionError" in line
    assert not files_of(tmp_path)
    refused(
        "evaluate", world.tied, "--data", world.data, *QUICK, "--image-size", "48",
        words=["48 x 48", "--image-size"],
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
        refused(*command, words=["there.safetensors exists already", "--force"])
    for command in _writers(world, "folder.safetensors"):
        refused(*command, words=["is a folder", "Name a file"])
        refused(*command, "--force", words=["is a folder", "Name a file"])
    for command in _writers(world, "no/such/place.safetensors"):
        refused(*command, words=["The folder no/such does not exist", "-o"])
    for command in _writers(world, "there.safetensors/below.safetensors"):
        refused(*command, words=["there.safetensors", "-o"])

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    for command in _writers(world, "out.safetensors"):
        refused(*command, words=["Permission denied", "-o", "permissions"])
    assert files_of(tmp_path) == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_an_export_needs_a_known_form_and_ending(world: World, here: Path) -> None:
    refused("export", world.tied, "-o", "out.bin", words=["out.bin", ".safetensors"])
    refused("export", world.tied, "-o", "out.pth", "--to", "onnx", words=["onnx", ".onnx"])


def test_a_full_disk_leaves_what_was_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out.safetensors").write_text("mine")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    for command in (_writers(world, "out.safetensors")[0], _writers(world, "out.safetensors")[2]):
        refused(*command, "--force", words=["No space left on device", "Free some space"])
    assert files_of(tmp_path) == {"out.safetensors"}
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_a_disk_that_fills_while_safetensors_writes(
    world: World, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tiedconv.io.safetensors_file.write_all", full)
    for command in _writers(world, "out.safetensors")[::2]:
        refused(*command, words=["No space left on device", "Free some space"])


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
