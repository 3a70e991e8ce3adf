"""Layers as narrow as what is stored: outputs, shapes, multiply-adds, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import slow_unless
from error_codes import raises
from micro import all_micros
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.core.pad import has_pads
from tiedconv.errors import UserError
from tiedconv.runtime.macs import unfused
from tiedconv.runtime.narrow_layers import narrow_layers, untie
from tiedconv.runtime.tie import is_tied, state_of

NAMES = ("torchvision-vit", "torchvision-resnet", "timm-vit", "timm-vit-qknorm", "timm-deit",
         "timm-resnet", "hf-vit", "hf-deit", "hf-resnet", "hf-imagegpt", "torch-encoder",
         "torch-transformer", "aliased", "hf-deformable-detr-refined", "hybrid")  # fmt: skip
FAST = ("timm-vit", "aliased", "hybrid")

LEFT = {
    # nn.MultiheadAttention wants queries of as many channels as its heads have together.
    **dict.fromkeys(("torchvision-vit", "torch-encoder", "torch-transformer", "aliased"),
                    ("in_proj_weight", "out_proj.weight")),
    # Its attentions have two heads whatever their attributes say.
    "hybrid": (*(f"{name}.weight" for name in ("query", "key", "value", "output.dense", "attn.q",
                                               "kv", "qkv", "attn.proj")),),
}  # fmt: skip
"""The ends of the names of the weights whose layers can't be narrow."""

each = pytest.mark.parametrize("name", slow_unless(NAMES, FAST))


def tied_of(name: str, **options: Any) -> nn.Module:
    return tiedconv.convert(all_micros()[name].model(), "narrow", **options).eval()


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, unfused():
        model(x)
    return int(counter.get_total_flops()) // 2


@each
def test_outputs_stay_and_no_padding_is_left(name: str) -> None:
    micro, tied = all_micros()[name], tied_of(name)
    before = micro.logits(tied)
    padded = {n for n, e in state_of(tied).plan.weights.items()
              if has_pads([e])}  # fmt: skip
    found = narrow_layers(tied)
    assert {*found.narrow} == {n for n in padded if not n.endswith(LEFT.get(name, ("\0",)))}
    assert {*found.left} == padded - {*found.narrow}
    assert bool(found.reason) == bool(found.left)
    weights = state_of(tied).plan.weights
    assert {n for n, e in weights.items() if has_pads([e])} == {*found.left}
    assert torch.allclose(micro.logits(tied), before, rtol=1e-5, atol=1e-5)
    # It is a tied model as any other.
    for change in (tiedconv.freeze, tiedconv.apply_factors, copy.deepcopy):
        other = change(copy.deepcopy(tied))
        other = other if isinstance(other, nn.Module) else tied
        assert torch.allclose(micro.logits(other), before, rtol=1e-5, atol=1e-5)
    assert narrow_layers(tied).narrow == ()


@each
def test_an_untied_model_stores_and_computes_no_removed_unit(name: str) -> None:
    micro, tied = all_micros()[name], tied_of(name)
    plan, before = state_of(tied).plan, micro.logits(tied)
    plain = untie(copy.deepcopy(tied))
    assert not is_tied(plain)
    assert [type(m) for m in plain.modules()] == [type(m) for m in micro.model().modules()]
    assert torch.allclose(micro.logits(plain), before, rtol=1e-5, atol=1e-5)
    own = dict(plain.named_parameters())
    for weight, expr in plan.weights.items():
        if weight.endswith(LEFT.get(name, ("\0",))):
            continue
        assert own[weight].numel() == sum(
            torch.Size(shape).numel() for shape in expr.refs.values()
        ), weight
    wide = untie(tied, narrow=False)
    assert {n: p.shape for n, p in wide.named_parameters()} == {
        n: p.shape for n, p in micro.model().named_parameters()
    }
    assert torch.allclose(micro.logits(wide), before, rtol=1e-5, atol=1e-5)
    # A narrow model trains, and can be converted again.
    micro.forward(plain, micro.input()).square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in plain.parameters())
    tiedconv.convert(plain, "lowrank", rank=2)


def test_multiply_adds_are_those_of_the_kept_units() -> None:
    micro = all_micros()["timm-vit"]
    model, x = micro.model().eval(), micro.input()
    tied = tied_of("timm-vit", width=0.25)
    tokens = x.shape[0] * (1 + (x.shape[-1] // model.patch_embed.patch_size[0]) ** 2)
    hidden, d = model.blocks[0].mlp.fc1.out_features, model.embed_dim
    whole = multiply_adds(model, x)
    removed = len(model.blocks) * 2 * tokens * d * (hidden - hidden // 4)
    # One of two heads stays; products of queries, keys and values are of a head each too.
    head = d // 2
    removed += len(model.blocks) * tokens * head * (4 * d + 2 * tokens // x.shape[0])
    assert multiply_adds(untie(copy.deepcopy(tied)), x) == whole - removed
    tiedconv.narrow_layers(tied)
    assert multiply_adds(tied, x) == whole - removed


def test_a_frozen_model_caches_narrow_weights_and_unfreezes() -> None:
    micro, tied = all_micros()["timm-vit"], tied_of("timm-vit")
    before = micro.logits(tied)
    tiedconv.freeze(tied)
    tiedconv.narrow_layers(tied)
    tiedconv.freeze(tied)
    kept = tied.blocks[0].mlp.fc1.out_features
    assert tuple(tied.blocks[0].mlp.fc1.weight.shape) == (kept, 32)
    assert torch.allclose(micro.logits(tied), before, atol=1e-5)
    tied.train()
    tied(micro.input()).sum().backward()


class Counted(nn.Module):
    """A feed-forward that uses its width in another way than by its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.linear1(x))
        return x + self.linear2(y) * (y.shape[-1] / 32)


class Stack(nn.Module):
    """Three layers, of which the second is `Counted`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Counted() if i == 1 else nn.TransformerEncoderLayer(16, 2, 32) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_layer_whose_outputs_would_change_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    tied = tiedconv.convert(model, "narrow", width=0.5).eval()
    x = torch.randn(2, 5, 16)
    before = tied(x).detach()
    found = narrow_layers(tied, x)
    assert {n for n in found.left if "linear" in n} == {
        "layers.1.linear1.weight", "layers.1.linear2.weight"
    }  # fmt: skip
    assert found.reason
    assert len(found.narrow) == 4
    assert torch.allclose(tied(x), before, atol=1e-5)
    assert tied.layers[1].linear1.out_features == 32
    assert tied.layers[0].linear1.out_features == 16
    assert torch.allclose(tiedconv.untie(tied)(x), before, atol=1e-5)


class NeedsTwo(nn.Module):
    """A model that takes no usual input."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x + y)
        return x


def test_a_model_that_takes_no_usual_input_needs_an_example() -> None:
    x = torch.randn(1, 3, 16)
    tied = tiedconv.convert(NeedsTwo(), "narrow", example=(x, x))
    found = narrow_layers(copy.deepcopy(tied))
    assert len(found.left) == len(state_of(tied).plan.weights)
    assert "example" in found.reason
    assert len(narrow_layers(tied, (x, x)).narrow) == 4


@pytest.mark.parametrize(
    "to", ["dense", "compact", *(pytest.param(f, marks=pytest.mark.slow) for f in ("pt2", "onnx"))]
)
def test_exports_with_a_graph_are_narrow_and_say_so(to: str, tmp_path: Path) -> None:
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32, "num_classes": 5}
    tied = tiedconv.convert("timm:vit_tiny_patch16_224", "narrow", weights="none", model_args=args)
    tiedconv.save(tied, tmp_path / "m.safetensors")
    ending = {"dense": "pth", "compact": "safetensors", "pt2": "pt2", "onnx": "onnx"}[to]
    done = tiedconv.export(tmp_path / "m.safetensors", tmp_path / f"out.{ending}", to)
    plan = state_of(tied).plan
    if to == "dense":
        assert set(done.facts["padded"]) == set(plan.weights)
        assert done.parameters == plan.original
    elif to == "compact":
        assert "padded" not in done.facts
    else:
        assert set(done.facts["narrow"]) == set(plan.weights)
        assert done.facts["padded"] == []
        assert done.weight_bytes < 4 * plan.stored


def test_a_report_of_narrow_layers_is_of_what_was_converted() -> None:
    tied = tied_of("timm-vit")
    before = tiedconv.report(tied)
    narrow_layers(tied)
    assert state_of(tied).plan != state_of(tied).wide
    assert tiedconv.report(tied) == before


def test_a_model_with_narrow_layers_is_not_saved(tmp_path: Path) -> None:
    tied = tied_of("timm-vit")
    tiedconv.save(tied, tmp_path / "wide.safetensors")
    narrow_layers(tied)
    with raises(UserError, "layers-narrowed"):
        tiedconv.save(tied, tmp_path / "narrow.safetensors")
    assert not (tmp_path / "narrow.safetensors").exists()
    assert len(load_file(tmp_path / "wide.safetensors")) > 0
