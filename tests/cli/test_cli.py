"""The commands, as a user types them, on a tiny model and a tiny folder of images."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import (
    MODEL_ARGS,
    QUICK,
    SIZES,
    SPEC,
    World,
    figures,
    files_of,
    plain,
    refused,
    run,
    tiny_images,
    tiny_model,
)
from micro import schemes
from safetensors.torch import load_file

import tiedconv
from tiedconv.cli import common, render
from tiedconv.runtime.tie import state_of


@pytest.fixture(scope="module")
def finetuned(world: World) -> Path:
    """The tied model after three steps, with the original's weights as teacher."""
    path = world.root / "finetuned.safetensors"
    run(
        "finetune", world.tied, "--data", world.data, "-o", path, "--steps", 3, *QUICK,
        "--teacher", world.weights, "--lr", "1e-3",
    )  # fmt: skip
    return path


# Help and version


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("convert", "--scheme --output --params --rank --option --include --exclude --recipe "
                    "--weights --model-arg --dry-run --all-groups --image-size --seed --force "
                    "--json"),
        ("finetune", "--data --output --epochs --steps --teacher --batch-size --lr --optimizer "
                     "--warmup --temperature --distill --clip --augment --bn-batches --val-split "
                     "--layer-decay --ema --distillation --features --erasing --mixup --cutmix "
                     "--limit --device --workers --resume --strict --trust-code --force --json "
                     "--log --tensorboard --picture --no-picture"),
        ("evaluate", "--data --weights --model-arg --batch-size --limit --image-size --resize "
                     "--mean --std --interpolation --device --workers --strict --trust-code "
                     "--json"),
        ("report", "--format --all-groups --json"),
        ("verify", "--against --data --limit --trust-code --json"),
        ("bench", "--runtime --batch-size --rounds --threads --output --trust-code --force --json"),
        ("export", "--output --to --dtype --lower --opset --trust-code --force --json"),
        ("demo", "--output --seed --quick --json"),
        ("plan", "--params --calib --calib-images --weights --model-arg --image-size --resize "
                 "--mean --std --interpolation --strict --device --workers --seed --json"),
        ("sensitivity", "--calib --calib-images --keep --measure --sort --output --weights "
                        "--model-arg --batch-size --image-size --resize --mean --std "
                        "--interpolation --strict --device --workers --seed --force --json"),
    ],
)  # fmt: skip
def test_help_names_every_option(command: str, options: str) -> None:
    text = plain(run(command, "--help").stdout)
    for option in options.split():
        assert option in text
    assert text == plain(run(command, "-h").stdout)


def test_help_lists_the_commands_and_where_to_begin() -> None:
    text = plain(run("--help").stdout)
    for name in ("convert", "finetune", "evaluate", "report", "verify", "export", "bench", "demo"):
        assert f" {name} " in text
    assert "tiedconv demo" in text


def test_python_m_tiedconv() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tiedconv", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tiedconv {tiedconv.__version__}\n"
    assert not done.stderr


# Parameter counts


@pytest.mark.parametrize(
    ("arguments", "original", "stored"),
    [
        ("resnet50", 25_557_032, 21_919_784),
        ("resnet50 --option scale=false", 25_557_032, 21_919_784),
        ("resnet50 --option first=slice", 25_557_032, 21_227_560),
        ("resnet50 --option groups=all", 25_557_032, 19_675_176),
        ("resnet50 --option groups=all --option first=expand", 25_557_032, 18_282_536),
        (
            "resnet50 --option groups=all --option first=expand --option spatial=true",
            25_557_032,
            10_098_728,
        ),
        ("vit_b_16 --option scale=false", 86_567_656, 44_100_328),
        ("vit_l_16 --option scale=false", 304_326_632, 153_331_688),
        ("timm:vit_small_patch16_224 --option scale=false", 22_050_664, 11_433_832),
        ("timm:deit_tiny_patch16_224 --option scale=false", 5_717_416, 3_063_208),
    ],
)
def test_parameter_counts_of_a_dry_run(arguments: str, original: int, stored: int) -> None:
    said = figures(
        "convert", *arguments.split(), "--scheme", "tied", "--weights", "none", "--dry-run"
    )
    assert (said["original"], said["stored"]) == (original, stored)
    assert said["output"] is None
    assert said["ratio"] == pytest.approx(stored / original)


def test_the_papers_lors_of_deit_tiny_from_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "lors.toml"
    recipe.write_text(
        """
        [[rule]]
        scheme = "lors"
        include = "*attn*"
        rank = 32
        k = [1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 6]

        [[rule]]
        scheme = "lors"
        include = ["*mlp*"]
        rank = 32
        k = [6, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1]
        """
    )
    arguments = ("convert", "timm:deit_tiny_patch16_224", "--recipe", recipe, "--dry-run")
    assert figures(*arguments)["stored"] == 2_915_752
    assert re.search(r"lors +32-192 ", plain(run(*arguments).stdout))


def test_a_dry_run_reports_how_much_is_saved_and_what_would_save_half() -> None:
    result = run("convert", "resnet50", "--scheme", "tied", "--dry-run")
    assert "25,557,032 parameters become 21,919,784 (85.8 %), which saves 14.2 %" in result.stdout
    assert "10,098,728  39.5 %  --scheme tied --option groups=all --option first=expand" in (
        result.stdout
    )
    assert result.stderr == "Nothing was written: this was a dry run.\n"


def test_a_plan_that_saves_nothing_says_so() -> None:
    result = run("convert", "resnet50", "--scheme", "lors", "--rank", 2000, "--dry-run")
    assert "which saves nothing" in result.stdout
    assert "Lower the ranks" in result.stderr


def test_a_dry_run_at_a_budget_says_that_ranks_are_not_chosen_yet() -> None:
    result = run("convert", "vit_b_16", "--scheme", "auto", "--params", "30%", "--dry-run")
    assert "This is an estimate: the budget holds" in result.stdout
    assert "estimate" not in run("convert", "vit_b_16", "--scheme", "tied", "--dry-run").stdout


def test_ways_to_save_more_are_each_named_once() -> None:
    arguments = ("--scheme", "lors", "--option", "bases=2", "--params", "10%", "--dry-run")
    error = refused("convert", "vit_b_16", *arguments, error_code="budget-too-small")
    ways = re.findall(r"--scheme (\w+)[^;]* reaches ([\d,]+)", error)
    assert len(ways) == len(set(ways)) > 1


def test_every_group_on_a_line_of_its_own() -> None:
    tied = ("convert", "resnet50", "--scheme", "tied", "--dry-run")
    some = plain(run(*tied).stdout)
    every = plain(run(*tied, "--all-groups").stdout)
    assert "layer*.*.conv1-conv3 (x12)" in some
    assert "layer3.5.conv1-conv3" in every
    assert every.count("tied  ") == 12
    # Groups that are numbered in their stack are as many of a kind as those of numbered layers.
    for scheme in (("lowrank", "--rank", "8"), ("shared", "--option", "groups=adjacent:2")):
        reported = plain(run("convert", "vit_b_16", "--scheme", *scheme, "--dry-run").stdout)
        kinds = re.findall(r"^(\S+)\.\* \(x\d+\)", reported, re.MULTILINE)
        assert len(kinds) == len(set(kinds)) == 4


# From a model to a compact file and back


@pytest.mark.parametrize("scheme", sorted(schemes()))
def test_convert_verify_export_and_load_into_the_original_class(
    scheme: str, world: World, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    file, dense = tmp_path / "compact.safetensors", tmp_path / "dense.safetensors"
    said = figures(
        "convert", SPEC, *MODEL_ARGS, "--scheme", scheme, "--weights", world.weights, "-o", file
    )
    assert said["stored"] < said["original"]
    assert said["file_bytes"] == file.stat().st_size
    assert all(group["error"] is not None for group in said["groups"])

    checks = figures("verify", file)["checks"]
    assert {c["name"] for c in checks} >= {"bytes", "model", "ties", "outputs"}
    assert all(c["passed"] for c in checks)

    wrote = figures("export", file, "--to", "dense", "-o", dense)
    assert wrote["size"] == dense.stat().st_size
    original = timm.create_model("vit_tiny_patch16_224", **SIZES)
    original.load_state_dict(load_file(dense), strict=True)
    with torch.no_grad():
        expected = tiedconv.load(file)(tiny_images())
        torch.testing.assert_close(original.eval()(tiny_images()), expected, atol=1e-5, rtol=1e-5)


def test_a_pickle_of_weights_gives_the_same_file(world: World, tmp_path: Path) -> None:
    file = tmp_path / "from-pickle.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--scheme", "tied", "--weights", world.pickle, "-o", file)
    ours, theirs = load_file(file), load_file(world.tied)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_full_rank_gives_the_original_back(world: World, tmp_path: Path) -> None:
    file = tmp_path / "full.safetensors"
    run(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--scheme", "lors", "--rank", 32,
        "-o", file,
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(
            tiedconv.load(file)(tiny_images()), tiny_model()(tiny_images()), atol=1e-4, rtol=1e-4
        )


def test_random_weights_follow_the_seed(tmp_path: Path) -> None:
    sums = []
    for seed in (0, 0, 1):
        file = tmp_path / "random.safetensors"
        run(
            "convert", SPEC, *MODEL_ARGS, "--weights", "none", "--seed", seed, "-o", file, "--force"
        )
        sums.append(float(load_file(file)["pos_embed"].sum()))
    assert sums[0] == sums[1] != sums[2]


def test_a_budget_is_kept(world: World, tmp_path: Path) -> None:
    said = figures(
        "convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--scheme", "lors",
        "--params", "80%", "-o", tmp_path / "half.safetensors",
    )  # fmt: skip
    assert 0.79 < said["ratio"] <= 0.8
    count = said["stored"]
    plan = figures(
        "convert", SPEC, *MODEL_ARGS, "--scheme", "lors", "--params", count, "--dry-run"
    )  # fmt: skip
    assert 0.99 * count < plan["stored"] <= count


def test_include_and_exclude() -> None:
    def kinds(*options: str) -> set[str]:
        said = figures("convert", SPEC, *MODEL_ARGS, "--scheme", "tied", "--dry-run", *options)
        return {group["name"].split(".")[2] for group in said["groups"]}

    assert kinds() == {"attn", "mlp"}
    assert kinds("--include", "*mlp*") == {"mlp"}
    assert kinds("--exclude", "*mlp*") == {"attn"}


def test_the_output_is_named_after_model_and_scheme(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("convert", SPEC, *MODEL_ARGS, "--scheme", "lors", "--weights", "none")
    name = "timm-vit_tiny_patch16_224-lors.safetensors"
    assert files_of(tmp_path) == {name}
    assert f"Wrote {name} (" in result.stdout
    assert f"Next: tiedconv verify {name}\n" in result.stderr


def test_force_replaces_an_output(world: World, tmp_path: Path) -> None:
    file = tmp_path / "compact.safetensors"
    file.write_text("mine")
    command = world.convert(file)
    refused(*command, error_code="output-exists", words=["--force"])
    assert file.read_text() == "mine"
    run(*command, "--force")
    assert load_file(file).keys() == load_file(world.tied).keys()
    assert files_of(tmp_path) == {file.name}


# Fine-tuning and evaluation


def test_finetune_with_the_original_as_teacher(world: World, finetuned: Path) -> None:
    entry = tiedconv.report(finetuned).history[-1]
    assert entry["steps"] == 3
    assert entry["teacher"] == "tiny.safetensors"
    assert (entry["train_images"], entry["val_images"]) == (24, 12)
    assert not entry["held_out"]
    assert entry["command"].startswith("tiedconv finetune ")
    assert not finetuned.with_name(finetuned.name + ".run").exists()
    before, after = load_file(world.tied), load_file(finetuned)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    run("verify", finetuned)


def test_finetune_reports_what_it_did(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run(
        "finetune", world.tied, "--data", world.data, "-o", out, "--steps", 2, *QUICK,
        "--teacher", "none",
    )  # fmt: skip
    assert "12 validation images" in result.stdout
    assert "2 steps in" in result.stdout
    assert "teacher none" in result.stdout
    assert "\nteacher " not in plain(result.stdout)
    taught = run("finetune", world.tied, "--data", world.data, "-o", out, "--steps", 2, *QUICK,
                 "--force", "--teacher", world.weights)  # fmt: skip
    score = tiedconv.report(out).history[-1]["top1_teacher"]
    assert f"teacher {100 * score:.2f} %" in " ".join(plain(taught.stdout).split())
    assert f"(teacher: {100 * score:.2f} %)" in " ".join(plain(run("report", out).stdout).split())
    assert "before: top-1" in result.stderr


def test_finetune_prints_json_alone(world: World, tmp_path: Path) -> None:
    said = figures(
        "finetune", world.tied, "--data", world.data / "train", "-o", tmp_path / "o.safetensors",
        "--epochs", 1, *QUICK, "--teacher", "none", "--val-split", 0.25, "--limit", 9,
        "--optimizer", "sgd", "--augment", "flip",
    )  # fmt: skip
    assert said["held_out"]
    assert said["train_images"] == 9
    assert said["val_images"] == 6
    assert said["result"]["epochs"] == 1
    assert 0 <= said["result"]["top1"] <= 1


def test_finetune_takes_the_whole_recipe(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every option reaches the training, its images and the file's history."""
    finetune = import_module("tiedconv.commands.finetune")
    train, seen = finetune.train, []

    def watched(model: Any, train_data: Any, val_data: Any, config: Any, **more: Any) -> Any:
        seen.extend([train_data.transform, val_data.transform, config])
        return train(model, train_data, val_data, config, **more)

    monkeypatch.setattr(finetune, "train", watched)
    path = tmp_path / "o.safetensors"
    wanted = {
        "augment": "trivialaugment", "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0,
        "layer_decay": 0.75, "ema": 0.9, "distillation": "hard", "features": 0.1,
    }  # fmt: skip
    options = [part for k, v in wanted.items() for part in (f"--{k.replace('_', '-')}", v)]
    run(
        "finetune", world.tied, "--data", world.data, "-o", path, "--steps", 2, *QUICK,
        "--teacher", world.weights, *options,
    )  # fmt: skip
    entry = state_of(tiedconv.load(path)).history[-1]
    shown, plain_images, config = seen
    assert {name: entry["options"][name] for name in wanted} == wanted
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert (shown.augment, shown.erasing) == ("trivialaugment", 0.25)
    assert (plain_images.augment, plain_images.erasing) == ("none", 0.0)


def test_a_compact_teacher_has_images_prepared_as_it_wants(world: World, tmp_path: Path) -> None:
    from tiedconv.commands.evaluate import open_teacher
    from tiedconv.sources.models import source_of

    other = tmp_path / "other.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", other, "--mean", "0.1")
    source = source_of(state_of(tiedconv.load(world.tied)).source)
    for file, changed in ((world.tied, False), (other, True)):
        teacher, name = open_teacher(str(file), source)
        assert teacher is not None
        assert name == file.name
        assert bool(teacher._forward_pre_hooks) is changed


def test_an_interrupted_run_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its second epoch and resumed, it ends with the bits of a run in one go."""
    from tiedconv.training import engine

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"

    def command(output: Path) -> tuple[object, ...]:
        return (
            "finetune", world.tied, "--data", world.data, "-o", output, "--epochs", 2, *QUICK,
            "--teacher", "none", "--no-picture",
        )  # fmt: skip

    run(*command(whole))
    original = engine._Run.take

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.at.epoch == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(engine._Run, "take", interrupted)
    result = run(*command(parts), code=130)
    assert "--resume" in result.stderr
    assert files_of(tmp_path) == {
        whole.name,
        f"{parts.name}.run",
        f"{parts.name}.run/step-000000003.safetensors",
    }
    monkeypatch.undo()
    resumed = run(*command(parts), "--resume")
    assert "resumed after epoch 1" in resumed.stderr
    assert files_of(tmp_path) == {whole.name, parts.name}
    ours, theirs = load_file(parts), load_file(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_evaluate_a_file_and_a_model(world: World, finetuned: Path) -> None:
    dense = ("evaluate", SPEC, *MODEL_ARGS, "--weights", world.weights, "--data", world.data)
    said = figures(*dense, "--workers", 0)
    assert said["result"]["images"] == 12
    assert said["classes"] == 3
    assert said["preprocess"]["size"] == 32
    compact = figures("evaluate", finetuned, "--data", world.data, "--workers", 0)
    assert compact["result"]["top1"] == tiedconv.report(finetuned).top1
    text = run("evaluate", finetuned, "--data", world.data, "--workers", 0, "--limit", 6).stdout
    assert "finetuned.safetensors" in text
    assert "top-5" in text


def test_images_are_prepared_as_asked(world: World, tmp_path: Path) -> None:
    options = ("--mean", "0.1,0.2,0.3", "--std", "0.5", "--resize", 0, "--interpolation",
               "bilinear")  # fmt: skip
    file = tmp_path / "own.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", file, *options)
    used = figures("evaluate", file, "--data", world.data, "--workers", 0)["preprocess"]
    assert used == {
        "size": 32, "resize": None, "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3,
        "interpolation": "bilinear",
        "exif": False,
    }  # fmt: skip


# Reports


def test_report_as_a_table(world: World, finetuned: Path) -> None:
    text = plain(run("report", finetuned).stdout)
    for words in (
        "finetuned.safetensors: timm:vit_tiny_patch16_224",
        "fit error",
        "kept as it was",
        "whole model",
        "A forward pass still takes 553 k multiply-adds (3 x 32 x 32)",
        "- converted by tied",
        "- fine-tuned on images (24 images, 3 steps, teacher tiny.safetensors): top-1",
        "- made with timm",
    ):
        assert words in text
    assert max(map(len, text.split("A forward pass")[0].splitlines()[:-1])) <= 120


def test_report_of_several_files(world: World, finetuned: Path) -> None:
    table = plain(run("report", world.tied, finetuned).stdout)
    assert table.count("whole model") == 2
    summary = table.splitlines()[-2:]
    assert [line.split()[0] for line in summary] == ["tied.safetensors", "finetuned.safetensors"]


@pytest.mark.parametrize("several", [False, True])
def test_report_in_other_forms(several: bool, world: World, finetuned: Path) -> None:
    files = [world.tied, finetuned] if several else [finetuned]
    said = figures("report", *files)
    assert (
        run("report", *files, "--format", "json").stdout == run("report", *files, "--json").stdout
    )
    assert [one["name"] for one in said] == [file.name for file in files]
    report = tiedconv.report(finetuned)
    assert said[-1]["stored"] == report.stored
    assert said[-1]["ratio"] == report.ratio
    assert said[-1]["top1"] == report.top1
    assert said[-1]["groups"][0]["ratio"] == report.groups[0].ratio
    assert said[-1]["history"][-1]["step"] == "finetune"

    rows = list(csv.reader(run("report", *files, "--format", "csv").stdout.splitlines()))
    lines = run("report", *files, "--format", "md").stdout.splitlines()
    assert len({len(row) for row in rows}) == 1
    assert [cell.strip() for cell in lines[0][1:-1].split("|")] == rows[0]
    assert f" {report.stored:,} " in lines[-1]
    assert rows[0][0] == ("file" if several else "group")
    assert rows[-1][rows[0].index("stored")] == str(report.stored)
    assert len({line.count("|") for line in lines}) == 1
    if not several:
        assert rows[1][rows[0].index("fit error")] == str(report.groups[0].error)


def test_a_narrow_terminal_gets_fewer_columns() -> None:
    columns = render.GROUP_COLUMNS
    row = ["blocks.*.attn.q-o", "tied", "", "24", "3,538,944", "1,778,688", "50.3 %", "7.11 MB",
           "0.500", "0", "24"]  # fmt: skip
    assert "rank" not in render.fitting(columns, [row], None)[0]
    kept, cells = render.fitting(columns, [row], 60)
    assert list(kept) == ["group", "original", "stored", "ratio", "fit error"]
    assert sum(len(c) for c in cells[0]) < 60


def test_json_has_null_for_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclasses.dataclass
    class Figures:
        loss: float
        path: Path

        @property
        def double(self) -> float:
            return 2.0

    common.print_json([Figures(float("nan"), Path("a/b")), (1, {"x": float("inf")})])
    assert json.loads(capsys.readouterr().out) == [
        {"loss": None, "path": "a/b", "double": 2.0},
        [1, {"x": None}],
    ]


# Other sources


def test_a_folder_of_hugging_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    folder = tmp_path / "my-vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    run("convert", f"hf:{folder}")
    file = tmp_path / "my-vit-auto.safetensors"
    run("verify", file)
    dense = tmp_path / "dense.pth"
    run("export", file, "--to", "dense", "-o", dense)
    model = transformers.ViTForImageClassification(config)
    model.load_state_dict(torch.load(dense, weights_only=True), strict=True)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(x).logits, tiedconv.load(file)(x).logits, atol=1e-5, rtol=1e-5
        )


MODULE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width)})
            for _ in range(3)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).relu())
        return self.head(x)


def net(width=16):
    return Net(width)


net.preprocess = {
    "size": 32, "resize": None, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"
}
"""


def test_a_function_of_the_users(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli_test_models.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "net.safetensors"
    run("convert", "cli_test_models:net", "--model-arg", "width=24", "-o", file, "--scheme", "lors")
    for command in (
        ["verify", file],
        ["export", file, "-o", tmp_path / "dense.safetensors"],
        ["evaluate", file, "--data", world.data],
        ["finetune", file, "--data", world.data, "-o", tmp_path / "finetuned.safetensors"],
    ):
        if command[0] != "verify":
            refused(
                *command,
                error_code="code-not-trusted",
                words=["cli_test_models:net", "--trust-code"],
            )
        else:
            assert "--trust-code" in run(*command, code=3).stdout
            run(*command, "--allow-unchecked")
    run("verify", file, "--trust-code")
    run("evaluate", file, "--data", world.data, "--trust-code", "--workers", 0)
    run(
        "finetune", file, "--data", world.data, "-o", tmp_path / "finetuned.safetensors",
        "--steps", 2, "--trust-code", "--teacher", "none", *QUICK,
    )  # fmt: skip
    run("report", tmp_path / "finetuned.safetensors")
