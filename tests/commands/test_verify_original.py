"""The comparison with the original: each block is as far from it as the file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import MODEL_ARGS, World, refused, run
from error_codes import raises
from micro import all_micros
from torch import nn

import tiedconv
from tiedconv.commands.verify_original import compare_with_original
from tiedconv.errors import UserError, VerifyError
from tiedconv.runtime.tie import set_state, state_of, untie

MODEL = ("timm:vit_tiny_patch16_224", *MODEL_ARGS)


@pytest.mark.parametrize("scheme", ["tied", "lors", "lowrank"])
@pytest.mark.parametrize(
    "name",
    [
        "timm-vit",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("torchvision-resnet", "hf-vit", "timm-resnet")
        ),
    ],
)
def test_a_conversion_at_full_rank_is_the_original_block_by_block(name: str, scheme: str) -> None:
    micro = all_micros()[name]
    original = micro.model()
    model = tiedconv.convert(micro.model(), scheme, rank=10**6)
    checks = compare_with_original(model, original, "random", micro.input())
    assert [check.name for check in checks] == ["blocks", "original"]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_at_a_lower_rank_the_distance_is_near_the_error_of_the_fit(rank: int) -> None:
    micro = all_micros()["timm-vit"]
    model = tiedconv.convert(micro.model(), "lors", rank=rank)
    blocks = compare_with_original(model, micro.model(), "random", micro.input())[0]
    assert blocks.passed


def swap_heads(model: nn.Module) -> None:
    """What a symmetry that is none would do: the heads of q alone change places."""
    with torch.no_grad():
        weight: Any = model.get_submodule("blocks.1.attn.qkv")._parameters["weight"]
        half = len(weight) // 6
        weight[: 2 * half] = weight[: 2 * half].roll(half, 0)


def test_a_block_that_moved_further_than_its_weights_is_found() -> None:
    micro = all_micros()["timm-vit"]
    broken = micro.model()
    swap_heads(broken)
    model = tiedconv.convert(broken, "lors", rank=10**6)
    with raises(VerifyError, "block-differs", "blocks.1"):
        compare_with_original(model, micro.model(), "random", micro.input())


def rounded(model: nn.Module, bits: int) -> nn.Module:
    size = {8: "32%", 4: "20%"}[bits]
    return tiedconv.convert(model, "auto", bytes=size, bits=str(bits), include=["blocks.*"])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_only_rounded_is_as_far_as_rounding_explains(bits: int) -> None:
    micro = all_micros()["timm-vit"]
    model = rounded(micro.model(), bits)
    blocks = compare_with_original(model, micro.model(), "random", micro.input())[0]
    assert blocks.passed


def test_integers_of_other_weights_are_found() -> None:
    micro = all_micros()["timm-vit"]
    broken = micro.model()
    swap_heads(broken)
    with raises(VerifyError, "block-differs", "blocks.1"):
        compare_with_original(rounded(broken, 8), micro.model(), "random", micro.input())


def halved(model: nn.Module) -> nn.Module:
    """A model stored in float16: a budget of bytes that asks for nothing more."""
    made = tiedconv.convert(model, "auto", bytes="70%")
    assert not state_of(made).plan.weights
    return made


def test_matrices_stored_as_they_were_are_compared_too() -> None:
    micro = all_micros()["timm-vit"]
    checks = compare_with_original(halved(micro.model()), micro.model(), "random", micro.input())
    assert [(check.name, check.passed) for check in checks] == [
        ("blocks", True),
        ("original", True),
    ]
    broken = micro.model()
    swap_heads(broken)
    with raises(VerifyError, "block-differs", "blocks.1"):
        compare_with_original(halved(broken), micro.model(), "random", micro.input())


def test_another_model_is_no_original() -> None:
    model = tiedconv.convert(all_micros()["timm-vit"].model(), "lors", rank=2)
    other = all_micros()["torchvision-resnet"]
    with raises(UserError, "original-differs"):
        compare_with_original(model, other.model(), "random", other.input())


def test_the_command_takes_weights_and_says_what_it_compared(world: World, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    run(
        "convert", *MODEL, "--weights", world.weights, "--scheme", "lors", "--rank", 4, "-o", output
    )
    done = json.loads(run("verify", output, "--original", world.weights, "--json").stdout)
    names = [check["name"] for check in done["checks"]]
    assert names[-2:] == ["blocks", "original"]
    assert "not_checked" in done
    refused("verify", output, "--original", "auto", error_code="original-unavailable")
    refused("verify", output, "--original", tmp_path / "none.pth", error_code="weights-unreadable")


def test_after_training_the_distance_is_told_and_not_judged(world: World) -> None:
    model = tiedconv.load(world.tied)
    original = untie(tiedconv.load(world.tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    x = torch.rand(2, 3, 32, 32)
    with raises(VerifyError, "block-differs"):
        plain = tiedconv.convert(untie(tiedconv.load(world.tied)), "lors", rank=10**6)
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.mul_(1.3)
        compare_with_original(plain, original, "random", x)
    history = (*state_of(model).history, {"step": "finetune"})
    set_state(model, history=history)
    checks = compare_with_original(model, original, "random", x)
    assert checks[0].passed
    assert "trained since" in checks[0].detail
