"""A model in memory that a library built is saved such that its file alone is enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SIZES, tiny_model
from torch import nn

import tiedconv
from tiedconv.data.transforms import eval_transform
from tiedconv.errors import SourceError, UserError
from tiedconv.sources import Preprocess
from tiedconv.sources.in_memory import alike, source_in_memory


def reloaded(model: nn.Module, tmp_path: Path, **options: Any) -> nn.Module:
    tied = tiedconv.convert(model, "tied", **options)
    tiedconv.save(tied, tmp_path / "a.safetensors")
    again = tiedconv.load(tmp_path / "a.safetensors")
    for name, tensor in tied.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    return again


def test_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=5, in_chans=1, pretrained=False
    )
    found = source_in_memory(model)
    assert found.spec.startswith("timm:vit_tiny_patch16_224")
    assert found.kwargs == {"num_classes": 5, "in_chans": 1, "img_size": 32}
    assert found.weights == "memory"
    assert found.preprocess is not None
    assert (found.preprocess.size, found.preprocess.channel_count()) == (32, 1)
    again = reloaded(model, tmp_path)
    x = torch.randn(2, 1, 32, 32)
    assert again.pretrained_cfg == model.pretrained_cfg
    dense = tmp_path / "dense.safetensors"
    tiedconv.export(tmp_path / "a.safetensors", dense, to="dense")
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=5, in_chans=1, checkpoint_path=str(dense)
    )
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(x), again(x), atol=1e-5, rtol=1e-5)


def test_what_timm_would_build_otherwise_is_not_named() -> None:
    # Other widths and heads than the name says: no argument that is tried gives them.
    assert source_in_memory(tiny_model()).spec == ""
    assert SIZES["embed_dim"] == 32


def test_a_model_of_torchvision(tmp_path: Path) -> None:
    from tiedconv.sources.torchvision_compat import import_torchvision

    models: Any = import_torchvision().models
    found = source_in_memory(models.resnet50(num_classes=7))
    assert (found.spec, found.kwargs) == ("resnet50", {"num_classes": 7})
    assert found.preprocess is not None
    assert found.preprocess.size == 224
    assert (
        source_in_memory(models.resnet50(replace_stride_with_dilation=[False, True, True])).spec
        == ""
    )


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    assert source_in_memory(model).spec == "hf:ViTForImageClassification"
    again = reloaded(model, tmp_path)
    assert type(again) is type(model)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        dense = tiedconv.untie(tiedconv.load(tmp_path / "a.safetensors"))
        torch.testing.assert_close(again(x).logits, dense(x).logits, atol=1e-5, rtol=1e-5)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_model_of_ones_own_needs_its_class(tmp_path: Path) -> None:
    assert source_in_memory(Own()).spec == ""
    tiedconv.save(tiedconv.convert(Own(), "lowrank", rank=4), tmp_path / "a.safetensors")
    with pytest.raises(SourceError):
        tiedconv.load(tmp_path / "a.safetensors")


def test_changed_models_are_not_alike() -> None:
    a, b = Own(), Own()
    assert alike(a, b)
    b.layers[0].forward = lambda x: x  # type: ignore[method-assign]
    assert not alike(a, b)
    c = Own()
    c.layers[1].register_forward_hook(lambda *_: None)
    assert not alike(c, a)
    d = Own()
    d.layers[0].in_features = 17
    assert not alike(a, d)


def test_the_images_of_a_plain_model_are_prepared_as_its_library_says() -> None:
    from tiedconv.sources.torchvision_compat import import_torchvision

    models: Any = import_torchvision().models
    assert tiedconv.transform(models.resnet18()) == eval_transform(Preprocess(224, 256))
    with pytest.raises(UserError) as caught:
        tiedconv.transform(nn.Linear(4, 4))
    assert caught.value.code == "preprocess-unknown"
