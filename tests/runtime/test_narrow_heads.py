"""Heads with norms of q and k, rotary positions or shared keys, and fused inverted bottlenecks.

None of these is a model of `micro`, on which every law is tried: they differ from those that are in
what is narrow alone.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.conversion.workload import count_macs
from tiedconv.runtime.macs import unfused, work_of
from tiedconv.runtime.outputs import floating_tensors
from tiedconv.runtime.tie import state_of
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import transformers  # noqa: E402
from timm.models.efficientnet import EfficientNet  # noqa: E402
from timm.models.eva import Eva  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models.efficientnet import EfficientNet as TorchvisionNet  # noqa: E402
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig  # noqa: E402

Made = tuple[nn.Module, Tensor]
IMAGE = (2, 3, 16, 16)


def qk_norm() -> Made:
    model = VisionTransformer(
        16, 8, num_classes=7, embed_dim=48, depth=2, num_heads=3, qk_norm=True
    )  # fmt: skip
    return model, torch.randn(IMAGE)


def rotary() -> Made:
    config = transformers.DINOv3ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=16, patch_size=8, num_register_tokens=1,
    )  # fmt: skip
    return transformers.DINOv3ViTModel(config), torch.randn(IMAGE)


def grouped(kind: str, **more: Any) -> Made:
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=4, vocab_size=64, max_position_embeddings=16, **more,
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config), torch.randint(0, 64, (2, 8))


def eva() -> Made:
    model = Eva(
        16, 8, num_classes=7, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2, qkv_fused=True,
        use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, ref_feat_shape=(2, 2),
    )  # fmt: skip
    return model, torch.randn(IMAGE)


def fused() -> Made:
    from timm.models._efficientnet_builder import decode_arch_def

    stages = decode_arch_def([["er_r1_k3_s2_e4_c16"], ["ir_r1_k3_s2_e4_c24_se0.25"]])
    return EfficientNet(stages, num_classes=5, num_features=32, stem_size=8), torch.randn(IMAGE)


def torchvision_fused() -> Made:
    stages = [FusedMBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(4, 3, 2, 16, 24, 1)]
    model = TorchvisionNet(stages, 0.0, last_channel=32, num_classes=5)
    return model, torch.randn(IMAGE)


MODELS: dict[str, tuple[Callable[[], Made], str]] = {
    "norms of q and k": (qk_norm, "q-k-v-o"),
    "rotary": (rotary, "q-k-v-o"),
    "rotary, in one qkv": (eva, "q-k-v-o"),
    "grouped": (functools.partial(grouped, "Llama"), "q-k-v-o"),
    "grouped, with biases": (functools.partial(grouped, "Qwen2"), "q-k-v-o"),
    "grouped, norms of q and k": (functools.partial(grouped, "Qwen3"), "q-k-v-o"),
    "fused bottleneck": (fused, "up-down"),
    "fused bottleneck of torchvision": (torchvision_fused, "up-down"),
}
WIDE = ("rotary, in one qkv",)
"""Whose attention needs as many channels as the model has: its heads stay padded."""

each = pytest.mark.parametrize("name", MODELS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name][0]()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval(), x


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return floating_tensors(model(x))[0]


def narrow(model: nn.Module, x: Tensor, width: float, **options: Any) -> nn.Module:
    tied = tiedconv.convert(
        copy.deepcopy(model), "narrow", width=width, step=1, example=x[:1], **options
    )
    return tied.eval()


def macs(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter, unfused():
        model(x[:1])
    return int(counter.get_total_flops()) // 2


@each
def test_all_units_reproduce_the_model(name: str) -> None:
    model, x = made(name)
    tied, whole = narrow(model, x, 0.9999), outputs(model, x)
    assert MODELS[name][1] in {g.options["roles"] for g in state_of(tied).plan.groups}
    torch.testing.assert_close(outputs(tied, x), whole, rtol=1e-4, atol=1e-5)


@each
def test_fewer_are_chosen_in_order_and_their_layers_are_narrow(name: str) -> None:
    model, x = made(name)
    tied = narrow(model, x, 0.5)
    found = state_of(tied).history[0]["symmetries"]
    assert not found["refused"]
    before, whole = outputs(tied, x), macs(model, x)
    plain = tiedconv.untie(copy.deepcopy(tied), example=x[:1])
    torch.testing.assert_close(outputs(plain, x), before, rtol=1e-4, atol=1e-5)
    own = dict(plain.named_parameters())
    groups = [g for g in state_of(tied).plan.groups if g.options["roles"] == MODELS[name][1]]
    assert groups
    for group in groups:
        slots = [member.slot for member in group.members]
        stored = sum(torch.Size(shape).numel() for shape in group.factors.values())
        held = sum(own[tensor].numel() for tensor in {slot.tensor for slot in slots})
        assert (held == stored) is (name not in WIDE)
    assert (macs(plain, x) < whole) is (name not in WIDE)
    workload, plan = count_macs(model, example=x[:1]), state_of(tied).plan
    assert workload is not None
    assert workload.total == whole
    tiedconv.narrow_layers(tied, x[:1])
    tiedconv.apply_factors(tied, cache=True)
    assert work_of(plan.weights, workload) == macs(tied, x)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_a_head_of_keys_goes_with_all_its_queries(kind: str) -> None:
    model, x = grouped(kind)
    attention: Any = model.eval().model.layers[1].self_attn
    with torch.no_grad():  # of the second head of keys nothing is read
        attention.o_proj.weight[:, 8:16] = 0.0
        attention.v_proj.weight[4:8] = 0.0
        attention.q_proj.weight[8:16].mul_(1e-3)
        attention.k_proj.weight[4:8].mul_(1e-3)
    tied = narrow(model, x, 0.75, include=["*layers.1.self_attn*"])
    torch.testing.assert_close(outputs(tied, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    tiedconv.narrow_layers(tied, x[:1])
    rows = [getattr(tied.model.layers[1].self_attn, f"{r}_proj").out_features for r in "qkv"]
    assert rows == [24, 12, 12]
    torch.testing.assert_close(outputs(tied, x), outputs(model, x), rtol=1e-4, atol=1e-5)
