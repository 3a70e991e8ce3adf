"""What was published in half precision is stored in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import MODEL_ARGS, QUICK, World, figures, run
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiedconv
from tiedconv.io.checkpoint_reader import read
from tiedconv.io.narrowing import half_type, narrowed

MODEL = ("timm:vit_tiny_patch16_224", *MODEL_ARGS)


def half_file(world: World, path: Path, dtype: torch.dtype) -> Path:
    """The weights of the tiny model in half precision."""
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(world.weights).items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


@pytest.mark.parametrize("ending", ["safetensors", pytest.param("pth", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_file_stays_so_through_convert_verify_and_finetune(
    world: World, tmp_path: Path, dtype: torch.dtype, ending: str
) -> None:
    weights = half_file(world, tmp_path / f"w.{ending}", dtype)
    output, tuned = tmp_path / "o.safetensors", tmp_path / "t.safetensors"
    words = ("convert", *MODEL, "--weights", weights, "--scheme", "lors", "--params", "60%")
    done = run(*words, "-o", output)
    name = str(dtype).removeprefix("torch.")
    assert name in done.stdout
    assert {t.dtype for t in load_file(output).values() if t.ndim > 1} == {dtype}
    report = figures("report", output)[0]
    assert report["original_dtype"] == name
    assert report["original_bytes"] == 2 * report["original"]
    assert report["tensor_bytes"] < 0.7 * report["original_bytes"]
    run("verify", output)
    model = tiedconv.load(output)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tune = ("--data", world.data, "--teacher", "none", "--steps", 1, *QUICK)
    run("finetune", output, *tune, "-o", tuned)
    assert {t.dtype for t in load_file(tuned).values() if t.ndim > 1} == {dtype}
    run("verify", tuned)
    run("export", output, "-o", tmp_path / "f.safetensors", "--to", "compact", "--dtype", "float32")
    assert {t.dtype for t in load_file(tmp_path / "f.safetensors").values()} == {torch.float32}


def test_a_conversion_in_python_is_stored_in_half_precision_too(
    world: World, tmp_path: Path
) -> None:
    weights = half_file(world, tmp_path / "w.pth", torch.bfloat16)
    arguments = read(world.tied).source
    assert arguments is not None
    model = tiedconv.convert(
        "timm:vit_tiny_patch16_224", "tied", weights=weights, model_args=arguments["kwargs"]
    )
    tiedconv.save(model, tmp_path / "o.safetensors")
    stored = load_file(tmp_path / "o.safetensors")
    assert {t.dtype for t in stored.values() if t.ndim > 1} == {torch.bfloat16}
    x = torch.rand(2, 3, 32, 32)
    loaded = tiedconv.load(tmp_path / "o.safetensors")
    with torch.no_grad():
        assert torch.allclose(model.eval()(x), loaded(x), atol=0.05)


def test_a_full_precision_file_is_stored_as_before(world: World) -> None:
    assert {t.dtype for t in load_file(world.tied).values()} == {torch.float32}
    report = figures("report", world.tied)[0]
    assert (report["original_dtype"], report["original_bytes"]) == (
        "float32",
        4 * report["original"],
    )


def test_a_model_in_memory_keeps_its_type(world: World, tmp_path: Path) -> None:
    model = tiedconv.untie(tiedconv.load(world.tied)).bfloat16()
    tiedconv.save(tiedconv.convert(model, "lors", rank=2), tmp_path / "o.safetensors")
    assert tiedconv.report(tmp_path / "o.safetensors").original_dtype == "half precision"


@pytest.mark.parametrize(
    ("kinds", "half"),
    [
        ([("float16", 2), ("float32", 1)], "float16"),
        ([("bfloat16", 2), ("bfloat16", 4), ("int64", 2)], "bfloat16"),
        ([("float16", 2), ("float32", 2)], None),
        ([("float16", 2), ("bfloat16", 2)], None),
        ([("float32", 2)], None),
        ([], None),
    ],
)
def test_the_type_of_a_file_is_that_of_its_matrices(
    kinds: list[tuple[str, int]], half: str | None
) -> None:
    assert half_type((getattr(torch, name), (3,) * ndim) for name, ndim in kinds) == half


def test_what_half_precision_can_not_hold_is_left_as_it_is() -> None:
    def dtype(value: float | Tensor, half: torch.dtype | None, ndim: int = 2) -> torch.dtype:
        return narrowed(torch.full((2,) * ndim, value), half).dtype

    assert dtype(1e5, torch.float16) == torch.float32
    assert dtype(1e5, torch.bfloat16) == torch.bfloat16
    assert dtype(0.1, torch.bfloat16, ndim=1) == torch.float32
    assert dtype(0.5, torch.bfloat16, ndim=1) == torch.bfloat16
    assert dtype(0.1, None) == torch.float32
    assert narrowed(torch.arange(4), torch.float16).dtype == torch.int64
