"""The examples, run as they stand."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import SIZES, SPEC, write_images
from micro import settle
from safetensors.torch import save_file

import tiedconv
import tiedconv.sources as sources

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_examples_are_short(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    assert len(lines) < 60
    assert any(line.startswith('if __name__ == "__main__":') for line in lines)


@pytest.mark.slow
def test_convert_resnet50(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "resnet50.safetensors"
    example("convert_resnet50").main(["--weights", "none", "--small", "--output", str(file)])
    said = capsys.readouterr().out
    assert "25,557,032 parameters become 10,098,728" in said
    assert "the same outputs" in said
    assert tiedconv.report(file).stored == 10_098_728


def test_your_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("your_own_model").main([str(tmp_path / "own.safetensors")])
    assert "the same outputs" in capsys.readouterr().out


@pytest.mark.slow
def test_finetune_on_your_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    write_images(tmp_path / "images")
    sizes = {**SIZES, "depth": 6}
    model = settle(sources.open_source(SPEC, sizes, "none")[0])
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    file = tmp_path / "finetuned.safetensors"
    arguments: list[object] = [
        tmp_path / "images", "--model", SPEC,
        *(part for k, v in sizes.items() for part in ("--arg", f"{k}={v}")),
        "--weights", tmp_path / "weights.safetensors", "--batch-size", 8, "--workers", 0,
        "--output", file,
    ]  # fmt: skip
    example("finetune_on_your_images").main([str(word) for word in arguments])
    assert "top-1 before fine-tuning" in capsys.readouterr().out
    report = tiedconv.report(file)
    assert report.ratio <= 0.5
    assert report.history[-1]["teacher"] == "weights.safetensors"
