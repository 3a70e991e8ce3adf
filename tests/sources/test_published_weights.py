"""Weights enums of torchvision, and the transforms that come with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import run
from torch import nn

import tiedconv
from tiedconv.data.transforms import eval_transform
from tiedconv.errors import SourceError, UserError
from tiedconv.sources import Preprocess
from tiedconv.sources.models import open_model
from tiedconv.sources.published_weights import with_weights_named
from tiedconv.sources.torchvision_compat import import_torchvision

models: Any = import_torchvision().models
V1, V2 = models.ResNet50_Weights.IMAGENET1K_V1, models.ResNet50_Weights.IMAGENET1K_V2


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands for torchvision's download: what it was asked for, by the enum's member."""
    asked: list[Any] = []

    def fetch(self: Any, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
        asked.append(self)
        own: dict[str, torch.Tensor] = models.resnet50().state_dict()
        return own

    monkeypatch.setattr(type(V1), "get_state_dict", fetch)
    return asked


@pytest.mark.parametrize("weights", [V1, "IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V1"])
def test_they_are_named_by_the_enum_or_its_name(weights: Any) -> None:
    assert with_weights_named("resnet50", weights) == ("resnet50.IMAGENET1K_V1", "default")


def test_a_file_of_that_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGENET1K_V1").write_bytes(b"")
    assert with_weights_named("resnet50", "IMAGENET1K_V1") == ("resnet50", "IMAGENET1K_V1")
    assert with_weights_named("timm:resnet50", "A1_IN1K") == ("timm:resnet50", "A1_IN1K")


@pytest.mark.parametrize(
    ("spec", "weights", "code"),
    [
        ("resnet50", "IMAGENET1K_V9", "unknown-weights"),
        ("resnet50.IMAGENET1K_V9", "default", "unknown-weights"),
        ("resnet18", V1, "weights-of-another-model"),
        ("timm:resnet50", V1, "weights-of-another-model"),
        ("resnet50", "ViT_B_16_Weights.IMAGENET1K_V1", "weights-of-another-model"),
    ],
)
def test_others_are_refused(spec: str, weights: Any, code: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_model(spec, weights=weights)
    assert caught.value.code == code


def test_the_file_says_which_weights_and_their_preprocessing(
    tmp_path: Path, cached: list[Any]
) -> None:
    seen = {}
    for weights in (V1, V2):
        opened = open_model("resnet50", weights=weights)
        seen[weights] = opened.source.preprocess
        assert opened.source.weights == "default"
        assert opened.source.spec == f"resnet50.{weights.name}"
    assert cached == [V1, V2]
    assert seen == {V1: Preprocess(224, 256), V2: Preprocess(224, 232)}
    # What reads the spec later means the same weights.
    open_model("resnet50.IMAGENET1K_V1")
    assert cached[-1] == V1


def test_a_dry_run_knows_them_too() -> None:
    run("convert", "resnet50", "--weights", "IMAGENET1K_V1", "--dry-run")
    run("convert", "resnet50", "--weights", "IMAGENET1K_V9", "--dry-run", code=2)


def small() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16))


def test_their_transforms_say_how_images_of_a_model_in_memory_are_prepared() -> None:
    for given in (V2.transforms(), Preprocess(224, 232)):
        model = tiedconv.convert(small(), "lowrank", params=0.9, preprocess=given)
        assert tiedconv.transform(model) == eval_transform(Preprocess(224, 232))


def test_other_transforms_cannot_be_recorded() -> None:
    with pytest.raises(UserError) as caught:
        tiedconv.convert(small(), "lowrank", params=0.9, preprocess=lambda image: image)
    assert caught.value.code == "preprocess-not-known"
