"""What the tests of the commands share: a runner, a tiny model, a tiny folder of images."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from micro import settle
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import tiedconv.sources as sources
from tiedconv.cli import app

SPEC = "timm:vit_tiny_patch16_224"
SIZES = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}
MODEL_ARGS = [part for k, v in SIZES.items() for part in ("--model-arg", f"{k}={v}")]
TERMINATED = 143
QUICK = ["--workers", "0", "--device", "cpu", "--batch-size", "8"]

# Rich and click look at these; a test must not depend on where it runs.
_PLAIN = {"COLUMNS": "120", "FORCE_COLOR": None, "PY_COLORS": None, "TTY_COMPATIBLE": None}


def run(*arguments: object, code: int = 0) -> Result:
    """Run a command in this process; its exit code must be `code`."""
    words = [str(a) for a in arguments]
    before, sys.argv = sys.argv, ["tiedconv", *words]
    try:
        result = CliRunner().invoke(app, words, env=_PLAIN)
    finally:
        sys.argv = before
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code == TERMINATED != code:
        # Whoever ends the tests, as `timeout` does, means them, not the command that caught it.
        pytest.exit("SIGTERM while a command ran", returncode=TERMINATED)
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}"
    return result


def figures(*arguments: object) -> Any:
    """What a command prints with --json: nothing else may stand on standard output."""
    return json.loads(run(*arguments, "--json").stdout)


def refused(
    *arguments: object, error_code: str | Collection[str], words: Iterable[str] = (), code: int = 2
) -> str:
    """The one line that a command writes when it refuses.

    Args:
        arguments: the command.
        error_code: the `code` that the error must have, or those that it may have.
        words: names and figures that the line must hold.
        code: the exit code.
    """
    result = run(*arguments, code=code)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    check_error(lines[0], error_code, words)
    return lines[0]


def check_error(line: str, error_code: str | Collection[str], words: Iterable[str] = ()) -> None:
    """A line that ends with an error's code, as the command line prints it."""
    match = re.fullmatch(r"error: .+ \[([a-z0-9-]+)\]", line)
    assert match, line
    allowed = [error_code] if isinstance(error_code, str) else error_code
    assert match[1] in allowed, line
    for word in words:
        assert word in line, (word, line)


def plain(text: str) -> str:
    """Text without colours, lines without spaces at their ends."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def files_of(folder: Path) -> set[str]:
    """All that lies in a folder, hidden files too."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@dataclass(frozen=True)
class World:
    """Files that the commands work on.

    Args:
        root: where they are.
        data: a folder of images in three classes, with `train/` and `val/`.
        weights: of the tiny model, as safetensors.
        pickle: the same as torch saves it.
        tied: the tiny model converted with the scheme `tied`.
    """

    root: Path
    data: Path
    weights: Path
    pickle: Path
    tied: Path

    def convert(self, output: Path, scheme: str = "tied") -> list[object]:
        """The command that converts the tiny model."""
        return [
            "convert", SPEC, *MODEL_ARGS, "--weights", self.weights, "--scheme", scheme,
            "-o", output,
        ]  # fmt: skip


def make_world(root: Path) -> World:
    """Make those files."""
    write_images(root / "images")
    state = tiny_model().state_dict()
    save_file(state, root / "tiny.safetensors")
    torch.save({"model": state, "epoch": 3}, root / "tiny.pth")
    weights, pickle = root / "tiny.safetensors", root / "tiny.pth"
    world = World(root, root / "images", weights, pickle, root / "tied.safetensors")
    run(*world.convert(world.tied))
    return world


def tiny_model() -> nn.Module:
    """The tiny ViT, with weights that are the same each time."""
    return settle(sources.open_source(SPEC, SIZES, "none")[0])


def tiny_images() -> Tensor:
    """Four images for it."""
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def write_images(folder: Path, train: int = 8, val: int = 4) -> None:
    """Noise around one colour for each class, which a model can learn."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("blue", "green", "red")):
        for part, count in (("train", train), ("val", val)):
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3))
                pixels[..., label] += 120
                Image.fromarray(pixels.astype("uint8")).save(place / f"{i}.png")
