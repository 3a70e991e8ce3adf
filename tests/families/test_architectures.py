"""Published architectures: what lies in blocks, and pairs counted by formula."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tiedconv.families.inspect import inspect_model
from tiedconv.planning.coverage import coverage
from tiedconv.planning.planner import outline
from tiedconv.planning.recipe import Recipe
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402

SIDE: dict[str, Any] = {"image_size": 64, "patch_size": 16}
QUICK = [
    "torchvision:resnet18",
    "torchvision:mobilenet_v2",
    "timm:test_byobnet",
    "timm:test_vit",
]
SLOW = """
    torchvision:densenet121 torchvision:googlenet torchvision:regnet_y_400mf
    torchvision:swin_t torchvision:vgg16 torchvision:maxvit_t torchvision:fasterrcnn_resnet50_fpn
    torchvision:retinanet_resnet50_fpn torchvision:deeplabv3_resnet50 timm:hrnet_w18_small
    timm:efficientvit_b0 timm:tiny_vit_5m_224 timm:regnetz_005 timm:dla46_c timm:resnetv2_50
    timm:nfnet_f0 timm:davit_tiny timm:maxvit_tiny_tf_224 timm:pvt_v2_b1 timm:twins_svt_small
    timm:eva02_tiny_patch14_224 timm:vit_small_plus_patch16_dinov3 timm:repvgg_a2
""".split()  # noqa: SIM905


def built(name: str) -> nn.Module:
    """On the meta device, where its constructor lets it."""
    library, _, which = name.partition(":")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _built(library, which)
    except NotImplementedError:
        return _built(library, which)


def _built(library: str, which: str) -> nn.Module:
    if library == "timm":
        model: nn.Module = timm.create_model(which)
        return model
    options: dict[str, Any] = {"weights": None}
    if which.endswith("resnet50_fpn") or which.startswith("deeplab"):
        options["weights_backbone"] = None
    if which == "googlenet":
        options["init_weights"] = False
    found: nn.Module = torchvision.models.get_model(which, **options)
    return found


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_nearly_all_matrices_lie_in_blocks(name: str) -> None:
    model = built(name)
    info = inspect_model(model)
    inside = {s.tensor for _, block in info.blocks for s in block.slots.values()}
    wanted = {
        f"{n}.weight": m.weight.numel()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
        or (isinstance(m, nn.Conv2d) and (m.groups == 1 or m.weight.shape[1] > 1))
    }
    covered = sum(size for n, size in wanted.items() if n in inside or n in info.aliases)
    assert covered > 0.95 * sum(wanted.values())
    # What a recipe takes without naming it: all but a detector's heads.
    assert coverage(info).share > 0.85


def ties(model: nn.Module) -> int:
    """Pairs that `tied` stores as one matrix."""
    groups = outline(inspect_model(model), Recipe.of("tied")).plan.groups
    return sum(group.scheme == "tied" for group in groups)


def transformer(config: str, cls: str, **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    return model


REPEATS = {"efficientnet_b0": (1, 2, 2, 3, 3, 4, 1), "mobilenet_v2": (1, 2, 3, 4, 3, 3, 1)}


def test_inverted_bottlenecks_that_keep_their_width_are_pairs() -> None:
    # The first block of a stage changes its width; the first stage does not expand.
    b0 = sum(n - 1 for n in REPEATS["efficientnet_b0"][1:])
    squeezes = sum(REPEATS["efficientnet_b0"])
    assert ties(built("timm:tf_efficientnet_lite0")) == b0 == 9
    assert ties(built("timm:efficientnet_b0")) == b0 + squeezes
    assert ties(built("torchvision:efficientnet_b0")) == b0 + squeezes
    assert ties(built("torchvision:mobilenet_v2")) == sum(
        n - 1 for n in REPEATS["mobilenet_v2"][1:]
    )


def test_layers_of_transformers_have_three_pairs() -> None:
    for model, layers in (
        (transformer("SegformerConfig", "SegformerModel"), 8),
        (transformer("LlamaConfig", "LlamaModel", hidden_size=96, intermediate_size=256,
                     num_hidden_layers=3, num_attention_heads=3, vocab_size=50), 3),
        (transformer("BertConfig", "BertModel", hidden_size=96, intermediate_size=384,
                     num_hidden_layers=3, num_attention_heads=3, vocab_size=50), 3),
        (transformer("SwinConfig", "SwinModel", image_size=64, embed_dim=32, depths=[2, 2],
                     num_heads=[2, 4], window_size=4), 4),
        (transformer("Dinov2Config", "Dinov2Model", hidden_size=96, num_hidden_layers=3,
                     num_attention_heads=3, use_swiglu_ffn=True, **SIDE), 3),
    ):  # fmt: skip
        assert ties(model) == 3 * layers, type(model).__name__


def test_where_queries_are_grouped_they_are_tied_to_the_output_alone() -> None:
    model = transformer(
        "MistralConfig", "MistralModel", hidden_size=96, intermediate_size=256,
        num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, vocab_size=50,
    )  # fmt: skip
    assert ties(model) == 2 * 3  # q with o, and the feed-forward


def test_a_giant_dinov2_is_covered_and_its_gated_feed_forwards_are_pairs() -> None:
    model = built("timm:vit_giant_patch14_dinov2")
    assert ties(model) == 3 * 40
    info = inspect_model(model)
    gate = math.prod(info.shapes["blocks.0.mlp.fc1.weight"]) // 2
    plan = outline(info, Recipe.of("tied")).plan
    tied = sum(g.original for g in plan.groups if g.scheme == "tied")
    assert tied == 40 * (4 * 1536 * 1536 + 2 * gate)
