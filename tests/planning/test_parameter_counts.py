"""Sizes to the digit: as published or worked out by hand, and from a formula of their own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from error_codes import raises
from planning_helpers import make_plan

import tiedconv
from tiedconv import sources
from tiedconv.core.plan import Plan
from tiedconv.families.inspect import ModelInfo, inspect_model
from tiedconv.planning.recipe import Recipe, Rule


@functools.cache
def anatomy_of(spec: str) -> ModelInfo:
    return inspect_model(sources.describe(spec)[0])


def planned(spec: str, scheme: str, **options: Any) -> Plan:
    return make_plan(anatomy_of(spec), Recipe.of(scheme, **options))[0]


def vit(d: int, m: int, layers: int, patch: int = 16, tokens: int = 197) -> int:
    """A dense ViT with 1,000 classes."""
    attention = 4 * d * d + 4 * d
    ffn = 2 * d * m + d + m
    block = attention + ffn + 4 * d
    stem = 3 * patch * patch * d + d + d + tokens * d  # patches, class token, positions
    return layers * block + stem + 2 * d + 1000 * d + 1000


def tied_vit(d: int, m: int, layers: int) -> int:
    """The same with half of every block's matrices: biases and norms stay."""
    return vit(d, m, layers) - layers * (2 * d * d + d * m)


@pytest.mark.parametrize(
    ("spec", "d", "layers", "dense", "tied"),
    [
        ("vit_b_16", 768, 12, 86_567_656, 44_100_328),
        pytest.param("vit_l_16", 1024, 24, 304_326_632, 153_331_688, marks=pytest.mark.slow),
        ("timm:vit_small_patch16_224", 384, 12, 22_050_664, 11_433_832),
        ("timm:deit_tiny_patch16_224", 192, 12, 5_717_416, 3_063_208),
    ],
)
@pytest.mark.parametrize("pairing", ["kv-qo", "vo-qk"])
def test_tied_vits(spec: str, d: int, layers: int, dense: int, tied: int, pairing: str) -> None:
    plan = planned(spec, "tied", scale=False, pairing=pairing)
    assert plan.original == vit(d, 4 * d, layers) == dense
    assert plan.stored == tied_vit(d, 4 * d, layers) == tied


def test_scales_cost_a_thousandth() -> None:
    d, m, layers = 768, 3072, 12
    plain = planned("vit_b_16", "tied", scale=False).stored
    # A pair has one scale for each row and column: d + m, and twice d + d in the attention.
    assert planned("vit_b_16", "tied", scale=True).stored == plain + layers * (d + m + 4 * d)


def test_a_rank_of_a_rank_option_costs_its_rows_and_columns() -> None:
    plain = planned("vit_b_16", "tied", scale=False).stored
    for rank in (1, 16):
        more = 12 * rank * ((768 + 3072) + 2 * (768 + 768))
        assert planned("vit_b_16", "tied", scale=False, rank=rank).stored == plain + more


# Stages of a ResNet50: width of the bottleneck, outputs, inputs of the first block, blocks.
STAGES = ((64, 256, 64, 3), (128, 512, 256, 4), (256, 1024, 512, 6), (512, 2048, 1024, 3))


def resnet50() -> int:
    total = 7 * 7 * 3 * 64 + 2 * 64 + 2048 * 1000 + 1000
    for width, outs, inputs, blocks in STAGES:
        for i in range(blocks):
            reads = outs if i else inputs
            total += reads * width + 9 * width * width + width * outs  # the convolutions
            total += 2 * (width + width + outs)  # the norms
        total += inputs * outs + 2 * outs  # the shortcut of the first block
    return total


def saved(*, first: str = "keep", staged: bool = False, spatial: bool = False) -> int:
    """Numbers that a tied ResNet50 does without."""
    total = 0
    for width, outs, inputs, blocks in STAGES:
        w = width * outs
        square = blocks - 1  # blocks whose conv1 and conv3 are both (outs, width)
        if staged:
            joined = 2 * square + (1 if first != "keep" else 0)
            total += (joined - 1) * w
            shared = square + (1 if first != "keep" else 0)
            total += (shared - 1) * 9 * width * width if spatial else 0
        else:
            total += square * w
        total += inputs * width if first == "slice" else 0
    return total


@pytest.mark.parametrize(
    ("options", "formula", "stored"),
    [
        ({}, {}, 21_919_784),
        ({"first": "slice"}, {"first": "slice"}, 21_227_560),
        ({"groups": "all"}, {"staged": True}, 19_675_176),
        ({"groups": "all", "first": "expand"}, {"staged": True, "first": "expand"}, 18_282_536),
        (
            {"groups": "all", "first": "expand", "spatial": True},
            {"staged": True, "first": "expand", "spatial": True},
            10_098_728,
        ),
    ],
)
@pytest.mark.parametrize("scale", [True, False])
def test_tied_resnet50(
    options: dict[str, Any], formula: dict[str, Any], stored: int, scale: bool
) -> None:
    plan = planned("resnet50", "tied", scale=scale, **options)
    assert plan.original == resnet50() == 25_557_032
    # The BatchNorms hold the scales, so asking for them costs nothing.
    assert plan.stored == resnet50() - saved(**formula) == stored


def test_tying_a_resnet50_alone_cannot_halve_it_and_the_program_says_what_does() -> None:
    with raises(tiedconv.TiedconvError, "budget-too-small", "spatial=True reaches 10,098,728"):
        planned("resnet50", "tied", params="50%")


ATTENTION_K = (*[1] * 9, 2, 4, 6)
FFN_K = (6, 4, 2, *[1] * 9)


def test_deit_tiny_lors_of_the_paper() -> None:
    recipe = Recipe(
        (
            Rule("lors", {"rank": 32, "k": list(ATTENTION_K)}, include=("*attn*",)),
            Rule("lors", {"rank": 32, "k": list(FFN_K)}, include=("*mlp*",)),
        )
    )
    plan = tiedconv.plan("timm:deit_tiny_patch16_224", recipe=recipe)
    d, m, layers, r = 192, 768, 12, 32
    bases = 3 * d * d + d * d + 2 * d * m
    residuals = sum(ATTENTION_K) * r * ((3 * d + d) + (d + d)) + sum(FFN_K) * r * 2 * (d + m)
    vectors = layers * (3 * d + d + m + d + 4 * d)  # biases and norms of the blocks
    encoder = sum(
        count
        for name, count in counts(plan).items()
        if name.startswith(("blocks.", "tied/"))
    )  # fmt: skip
    assert encoder == bases + residuals + vectors == 2_536_704
    assert plan.original == vit(d, m, layers) == 5_717_416
    assert plan.stored == vit(d, m, layers) - layers * bases + bases + residuals == 2_915_752


def counts(plan: Plan) -> dict[str, int]:
    """Numbers in each stored parameter."""
    sizes: dict[str, int] = {}
    for name, shape in {**plan.kept, **plan.factors}.items():
        sizes[name] = 1
        for n in shape:
            sizes[name] *= n
    return {n: size for n, size in sizes.items() if n not in plan.buffers}


def test_lors_on_a_vit_is_one_base_for_each_matrix_and_a_residual_for_each_layer() -> None:
    d, m, layers, r = 768, 3072, 12, 64
    plan = planned("vit_b_16", "lors", rank=r)
    bases = 3 * d * d + d * d + 2 * d * m
    residuals = layers * r * ((3 * d + d) + (d + d) + 2 * (d + m))
    assert plan.stored == vit(d, m, layers) - layers * bases + bases + residuals


def test_shared_and_lowrank_baselines() -> None:
    d, m, layers = 768, 3072, 12
    block = 4 * d * d + 2 * d * m
    assert planned("vit_b_16", "shared").stored == vit(d, m, layers) - layers // 2 * block
    plan = planned("vit_b_16", "lowrank", rank=10)
    cost = 10 * ((3 * d + d) + (d + d) + 2 * (d + m))
    # The patch embedding and the classifier are matrices too.
    alone = sum(d * n - 10 * (d + n) for n in (3 * 16 * 16, 1000))
    assert plan.stored == vit(d, m, layers) - layers * (block - cost) - alone


@pytest.mark.parametrize("params", ["50%", "65%", "12M"])
@pytest.mark.parametrize("scheme", ["lors", "lowrank"])
def test_a_planned_budget_is_kept_and_used(scheme: str, params: str) -> None:
    plan = planned("resnet50", scheme, params=params)
    budget = 12_000_000 if params == "12M" else 25_557_032 * int(params[:-1]) // 100
    assert 0.99 * budget <= plan.stored <= budget
