"""Which weights of a file are taken, what is not finite in them, and files of other releases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import MODEL_ARGS, World, figures, refused, run
from error_codes import raises
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiedconv
from tiedconv import sources
from tiedconv.errors import UserError, WeightsError
from tiedconv.runtime.finite import IMMENSE, check_finite
from tiedconv.sources.models import open_model
from tiedconv.sources.torchvision_compat import import_torchvision
from tiedconv.sources.weights import Reading, read_weights

import_torchvision()
import timm  # noqa: E402

MODEL = "timm:test_vit"
FC1 = "blocks.0.mlp.fc1.weight"


def state(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    found: dict[str, Tensor] = timm.create_model("test_vit").state_dict()
    return found


@pytest.fixture(scope="module")
def last() -> dict[str, Tensor]:
    return state(1)


@pytest.fixture(scope="module")
def averaged() -> dict[str, Tensor]:
    return state(2)


def taken(path: Path, **options: Any) -> tuple[Tensor, str | None]:
    opened = open_model(MODEL, weights=path, reading=Reading(**options))
    return opened.model.state_dict()["head.weight"], opened.source.weights_part


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ({"state_dict": "last", "state_dict_ema": "averaged", "epoch": 3}, "state_dict_ema"),
        ({"model": "last", "model_ema": "averaged"}, "model_ema"),
        ({"model": "last", "ema": "averaged"}, "ema"),
        ({"ema": {"decay": 0.9, "module": "averaged"}, "model": "last"}, "ema.module"),
        ({"trainer": 1, "model": {"state_dict": "last", "ema": "averaged"}}, "model.ema"),
    ],
)
def test_averaged_weights_are_taken_unless_told_otherwise(
    tmp_path: Path,
    last: dict[str, Tensor],
    averaged: dict[str, Tensor],
    layout: dict[str, Any],
    part: str,
) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(inner) for key, inner in value.items()}
        return {"last": last, "averaged": averaged}.get(value, value)

    path = tmp_path / "c.pth"
    torch.save(filled(layout), path)
    assert read_weights(path).both
    for options in ({}, {"ema": True}):
        weight, where = taken(path, **options)
        assert torch.equal(weight, averaged["head.weight"])
        assert where == part
    weight, where = taken(path, ema=False)
    assert torch.equal(weight, last["head.weight"])
    assert where != part


def test_a_kind_of_weights_that_is_not_there_is_refused(
    tmp_path: Path, last: dict[str, Tensor]
) -> None:
    plain, only = tmp_path / "plain.pth", tmp_path / "only.pth"
    torch.save(last, plain)
    torch.save({"model_ema": last}, only)
    save_file(last, tmp_path / "plain.safetensors")
    for path in (plain, tmp_path / "plain.safetensors"):
        assert taken(path)[1] is None
        with raises(WeightsError, "no-ema-weights"):
            taken(path, ema=True)
    with raises(WeightsError, "only-ema-weights", "model_ema"):
        taken(only, ema=False)
    with raises(UserError, "option-without-effect"):
        open_model(MODEL, weights="none", reading=Reading(ema=True))
    with raises(UserError, "unknown-choice"):
        Reading(non_finite="ignore")


def test_convert_says_which_weights_it_took_and_the_file_records_it(
    tmp_path: Path, last: dict[str, Tensor], averaged: dict[str, Tensor]
) -> None:
    path, output = tmp_path / "c.pth", tmp_path / "o.safetensors"
    torch.save({"model": last, "model_ema": averaged}, path)
    words = ("convert", MODEL, "--weights", path, "--scheme", "lors", "--rank", "2", "-o", output)
    assert "model_ema" in run(*words).stdout
    assert torch.equal(load_file(output)["head.weight"], averaged["head.weight"])
    found = figures(*words, "--no-ema", "--force")
    assert found["weights_part"] == "model"
    assert torch.equal(load_file(output)["head.weight"], last["head.weight"])
    run("verify", output)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scheme", ["tied", pytest.param("lors", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["safetensors", "pth"])
@pytest.mark.parametrize(
    "value",
    [NAN, 2 * IMMENSE, *(pytest.param(v, marks=pytest.mark.slow) for v in (INF, -INF, 3e38))],
)
def test_what_is_not_finite_is_named_and_never_written(
    tmp_path: Path, last: dict[str, Tensor], form: str, scheme: str, value: float
) -> None:
    broken = {**last, FC1: last[FC1].clone()}
    broken[FC1].view(-1)[3:5] = value
    path, output = tmp_path / f"w.{form}", tmp_path / "o.safetensors"
    (save_file if form == "safetensors" else torch.save)(broken, path)
    words = ("convert", MODEL, "--weights", path, "--scheme", scheme, "-o", output)
    refused(*words, error_code="weights-not-finite", words=[FC1, "2"])
    assert not output.exists()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    run(*words, "--non-finite", "zero")
    assert all(bool(t.isfinite().all()) for t in load_file(output).values())
    refused("plan", MODEL, "--weights", path, "--calib", tmp_path, error_code="weights-not-finite")


def test_a_model_in_memory_is_refused_and_left_as_it_was() -> None:
    model = timm.create_model("test_vit")
    with torch.no_grad():
        model.get_parameter(FC1)[0, 0] = NAN
    with raises(WeightsError, "weights-not-finite", FC1):
        tiedconv.convert(model, "tied")
    assert bool(model.get_parameter(FC1)[0, 0].isnan())


def test_masks_of_infinities_are_sound_but_not_those_of_nan() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([-INF, 0.0, torch.finfo(torch.float32).min]))
    check_finite(model)
    model.register_buffer("mean", torch.tensor([NAN]))
    with raises(WeightsError, "weights-not-finite", "mean"):
        check_finite(model)
    check_finite(model, "zero")
    assert float(model.get_buffer("mean")) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_any_width_are_looked_at(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 3).to(dtype)
    check_finite(model)
    with torch.no_grad():
        model.bias[1] = INF
    with raises(WeightsError, "weights-not-finite", "bias (1)"):
        check_finite(model)


def test_plan_refuses_the_weights_of_another_model(world: World, tmp_path: Path) -> None:
    words = ("plan", "timm:vit_tiny_patch16_224", *MODEL_ARGS)
    run(*words, "--weights", world.weights)
    run(*words, "--weights", world.pickle)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "other.safetensors")
    for name in ("other.pth", "other.safetensors"):
        refused(*words, "--weights", tmp_path / name, error_code="weights-mismatch")


def test_timm_files_of_another_image_size_and_of_older_names_are_opened(tmp_path: Path) -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    small = timm.create_model("vit_tiny_patch16_224", img_size=32, **sizes)
    save_file(small.state_dict(), tmp_path / "small.safetensors")
    given = {**sizes, "img_size": 64}
    opened = sources.open_source(
        "timm:vit_tiny_patch16_224", given, tmp_path / "small.safetensors"
    )[0]
    assert opened.pos_embed.shape[1] == 17
    assert torch.equal(opened.head.weight, small.head.weight)

    narrow = {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "num_classes": 5}
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **narrow)
    # As the authors' files have them: each stage ends with its downsampling.
    named = {
        re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", name).replace(
            "head.fc.", "head."
        ): tensor
        for name, tensor in swin.state_dict().items()
    }
    assert named.keys() != swin.state_dict().keys()
    torch.save({"model": named}, tmp_path / "swin.pth")
    opened = sources.open_source(
        "timm:swin_tiny_patch4_window7_224", {**narrow, "img_size": 56}, tmp_path / "swin.pth"
    )[0]
    assert all(torch.equal(a, opened.state_dict()[n]) for n, a in swin.state_dict().items())


@pytest.mark.parametrize(
    "change", [{"num_classes": 7}, {"in_chans": 1}, {"embed_dim": 96}, {"depth": 3}]
)
def test_timm_files_of_another_model_are_still_refused(
    tmp_path: Path, change: dict[str, int]
) -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with raises(WeightsError, "weights-mismatch"):
        sources.open_source(
            "timm:vit_tiny_patch16_224", {**sizes, **change}, tmp_path / "w.safetensors"
        )
