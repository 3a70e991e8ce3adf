"""The last line of a conversion is a command that runs as printed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MODEL_ARGS, SPEC, World, plain, refused, run
from covering import slow_unless
from task_helpers import write_colours
from towers import clip

HERE = str(Path(__file__).parents[1] / "helpers")
QUICK = ("--workers", 0, "--device", "cpu", "--effort", "fast")
SHORT = ("--steps", 1, "--batch-size", 4, "--workers", 0, "--device", "cpu", "--no-picture")
PREPARED = {
    "do_resize": True, "size": {"height": 32, "width": 32}, "do_normalize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor",
}  # fmt: skip


def printed(*words: Any) -> list[str]:
    """The command that a conversion ends with."""
    said = plain(run("convert", *words).stderr)
    found = re.search(r"^Next: tiedconv (.*)$", said, re.MULTILINE)
    assert found, said
    return shlex.split(found[1])


def model_of(kind: str, world: World, folder: Path) -> list[Any]:
    if kind == "weights of a file":
        return [SPEC, *MODEL_ARGS, "--weights", world.weights]
    if kind == "a function":
        return ["one_stage:one_stage", "--image-size", 64, "--resize", 0, "--mean", "0,0,0",
                "--std", "1,1,1"]  # fmt: skip
    clip().save_pretrained(folder / "clip")  # type: ignore[operator]
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return [f"hf:{folder / 'clip'}"]


KINDS = ("weights of a file", "a function", "a folder of transformers")


@pytest.mark.parametrize("kind", slow_unless(KINDS, KINDS[:1]))
def test_after_a_calibration_it_distils_on_the_same_images(
    kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE)  # where the function lies
    images = write_colours(tmp_path / "some images", count=4)
    model, file = model_of(kind, world, tmp_path), tmp_path / "c.safetensors"
    command = printed(
        *model, "-o", file, "--scheme", "lowrank", "--params", "80%", "--calib", images, *QUICK
    )
    assert command[0] == "finetune"
    run(*command, *SHORT)
    assert (tmp_path / "c-finetuned.safetensors").is_file()


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_an_output_is_chosen_for_images_only(command: str) -> None:
    refused(
        command, SPEC, *MODEL_ARGS, "--output-name", "logits", error_code="needs-calib",
        words=["--output-name"],
    )  # fmt: skip


def test_without_images_it_checks_the_file_and_says_what_is_missing(
    world: World, tmp_path: Path
) -> None:
    words = (SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", tmp_path / "c.safetensors")
    command = printed(*words)
    assert command[0] == "verify"
    run(*command)
    again = run("convert", *words, "--force").stderr
    assert "calibrated" in plain(again)
