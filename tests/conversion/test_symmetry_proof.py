"""A symmetry is used on a block only if a random one of its kind changes no output of it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import figures, run
from micro import all_micros, every_micro
from torch import Tensor, nn
from torch.nn import functional as F

import tiedconv
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.conversion.symmetry_proof import SymmetryProof, first_image
from tiedconv.errors import UserError
from tiedconv.families.inspect import inspect_model
from tiedconv.numerics.random_symmetries import RANDOM, applicable
from tiedconv.runtime.tie import state_of

HEADS = ("permute heads", "rotate q and k", "rotate v and o")
HIDDEN = ("permute hidden units", "scale hidden units")

Act = Callable[[Tensor], Tensor]


def _rotary(x: Tensor) -> Tensor:
    n, d = x.shape[-2:]
    angle = torch.arange(n)[:, None] * 0.5 ** torch.arange(d // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def _pooled(x: Tensor) -> Tensor:
    """As in Hiera: each pair of queries becomes the larger of both."""
    return torch.maximum(x, x.roll(1, -2))


class Attention(nn.Module):
    """An attention in timm's names, with something between its matrices."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.num_heads, self.how = 4, how
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        table = torch.randn(4, generator=torch.Generator().manual_seed(3))
        self.register_buffer("slopes", table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 4, -1).permute(2, 0, 3, 1, 4)
        bias = None
        if self.how == "rotary":
            q, k = _rotary(q), _rotary(k)
        elif self.how == "norm of q and k":
            q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
        elif self.how == "bias by head":
            far = (torch.arange(t)[:, None] - torch.arange(t)).abs()
            bias = (self.slopes[:, None, None] * far).to(x.dtype)
        elif self.how == "pooled queries":
            q = _pooled(q)
        elif self.how == "linear attention":
            q, k = q.relu(), k.relu()
            return self.proj((q @ (k.mT @ v)).transpose(1, 2).reshape(n, t, d))
        elif self.how == "heads in pairs":
            v = v.unflatten(1, (2, 2)).cumsum(2).flatten(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).reshape(n, t, d))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """A feed-forward in timm's names, with something between its matrices."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.fc1, self.act, self.fc2 = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.fc1(x))
        if self.how == "gate":
            a, b = h.chunk(2, -1)
            h = torch.cat([a * b.sigmoid(), b], -1)
        elif self.how == "groups":
            h = F.group_norm(h.transpose(1, 2), 8).transpose(1, 2)
        elif self.how == "squared":
            h = h.square()
        elif self.how == "clipped":
            h = h.clamp(max=6)
        elif self.how == "norm":
            h = F.layer_norm(h, h.shape[-1:])
        return self.fc2(h)  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, attention: str, feed_forward: str) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(attention), FeedForward(feed_forward)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)  # type: ignore[no-any-return]


class Layers(nn.Module):
    def __init__(self, attention: str = "", feed_forward: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.Sequential(*(Layer(attention, feed_forward) for _ in range(2)))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


def proven(model: nn.Module) -> list[set[str]]:
    """The names of the symmetries of each block that has any."""
    info = inspect_model(model)
    proof = SymmetryProof(info, model)
    return [{s for s in RANDOM if proof(b, s)} for _, b in info.blocks if applicable(b)]


@pytest.mark.parametrize(
    ("attention", "feed_forward", "expected"),
    [
        ("", "", {*HEADS, *HIDDEN}),
        ("rotary", "", {"permute heads", "rotate v and o", *HIDDEN}),
        ("norm of q and k", "", {"permute heads", "rotate v and o", *HIDDEN}),
        ("bias by head", "", {"rotate q and k", "rotate v and o", *HIDDEN}),
        ("pooled queries", "", {"permute heads", "rotate v and o", *HIDDEN}),
        ("linear attention", "", {"permute heads", "rotate v and o", *HIDDEN}),
        ("heads in pairs", "", {"rotate q and k", *HIDDEN}),
        ("", "gate", {*HEADS}),
        ("", "groups", {*HEADS}),
        ("", "squared", {*HEADS, "permute hidden units"}),
        ("", "clipped", {*HEADS, "permute hidden units"}),
        ("", "norm", {*HEADS, "permute hidden units"}),
    ],
)
@pytest.mark.parametrize("scheme", ["lors", "tied", pytest.param("shared", marks=pytest.mark.slow)])
def test_what_the_code_between_the_matrices_forbids_is_not_used(
    attention: str, feed_forward: str, expected: set[str], scheme: str
) -> None:
    model = Layers(attention, feed_forward).eval()
    found = proven(model)
    assert len(found) == 4
    assert set().union(*found) == expected
    if scheme != "shared":  # which stores nothing private
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
        tied = tiedconv.convert(model, scheme, rank=64 if scheme == "lors" else 32)
        with torch.no_grad():
            before, after = model(x), tied(x)
        assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
        refused = state_of(tied).history[0]["symmetries"]["refused"]
        assert set(refused).isdisjoint(expected)


@pytest.mark.parametrize("scheme", ["lors", "tied"])
def test_what_a_refused_symmetry_costs_the_fit_is_measured(scheme: str) -> None:
    """With it the fit is that of the same weights in a model that allows it."""
    refusing, allowing = Layers("rotary", "gate"), Layers()
    allowing.load_state_dict(refusing.state_dict(), strict=False)
    found = state_of(tiedconv.convert(refusing, scheme, rank=8)).history[0]["symmetries"]
    exact = state_of(tiedconv.convert(allowing, scheme, rank=8))
    assert "cost" not in exact.history[0]["symmetries"]
    assert len(found["cost"]) == 2
    for cost in found["cost"]:
        groups = [group for group in exact.plan.groups if group.name in cost["groups"]]
        assert len(groups) == len(cost["groups"]) > 0
        total = sum(g.original for g in groups)  # the weights are drawn alike
        error = math.sqrt(sum((g.error or 0.0) ** 2 * g.original for g in groups) / total)
        assert cost["error_if_exact"] == pytest.approx(error, rel=0.03)
        assert set(cost["symmetries"]) & {"rotate q and k", *HIDDEN}
    lost = [cost["error"] > 1.05 * cost["error_if_exact"] for cost in found["cost"]]
    assert any(lost)


class ImageAndText(nn.Module):
    """A model that no single tensor runs, of layers that take two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()
        for block in self.layers.blocks:
            block.attn = _Shifted(block.attn)

    def forward(self, image: Tensor, *, text: Tensor) -> Tensor:
        x = image
        for block in self.layers.blocks:
            x = x + block.attn(x, text)
            x = x + block.mlp(x)
        return x


class _Shifted(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = attn.num_heads, attn.qkv, attn.proj

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return Attention.forward(self, x + text)  # type: ignore[arg-type]

    how = ""


@pytest.mark.parametrize("params", [None, "70%"])
def test_an_example_proves_symmetries_of_a_model_with_unusual_inputs(params: str | None) -> None:
    model = ImageAndText().eval()
    options: dict[str, Any] = {"params": params} if params else {"rank": 32}
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 9, 32, generator=g), torch.randn(2, 1, 32, generator=g)
    refused = state_of(tiedconv.convert(model, "tied", **options)).history[0]["symmetries"]
    assert "rotate v and o" in refused["refused"]
    with pytest.raises(UserError) as caught:
        tiedconv.convert(model, "tied", example=x, **options)
    assert caught.value.code == "example-rejected"
    given = {"image": x, "text": text}
    tied = tiedconv.convert(model, "tied", example=given, **options)
    assert not state_of(tied).history[0]["symmetries"]["refused"]
    if params is None:
        with torch.no_grad():
            before, after = model(**given), tied(**given)
        assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


@pytest.mark.slow
def test_symmetries_of_the_known_architectures_are_proven() -> None:
    """All but those of a model that takes five tokens, no more and no fewer, and is run by none."""
    for name, micro in every_micro().items():
        model = micro.model()
        info = inspect_model(model)
        images: Any = None
        if name == "conditional-decoder":
            images = lambda micro=micro: micro.input()[:1]  # noqa: E731
        proof = SymmetryProof(info, model, images)
        for _, block in info.blocks:
            for symmetry in applicable(block):
                assert proof(block, symmetry), (name, block.name, symmetry)


@pytest.mark.parametrize(
    ("name", "arguments", "kept"),
    [
        ("swin_tiny_patch4_window7_224",
         {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4},
         {"rotate q and k", "rotate v and o"}),
        ("beit_base_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
         {"rotate q and k", "rotate v and o"}),
        ("vit_srelpos_small_patch16_224",
         {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
         {"rotate q and k", "rotate v and o"}),
        ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
         {*HEADS}),
    ],
)  # fmt: skip
def test_position_tables_by_head_keep_heads_in_place(
    name: str, arguments: dict[str, Any], kept: set[str]
) -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    info = inspect_model(model)
    proof = SymmetryProof(info, model)
    for _, block in info.blocks:
        if block.kind == "attention" and block.permutable:
            assert {s for s in HEADS if proof(block, s)} == kept, block.name
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    tied = tiedconv.convert(model, "lors", rank=10**6)
    with torch.no_grad():
        before, after = model(x), tied(x)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_without_weights_only_listed_classes_are_trusted() -> None:
    for model, expected in (
        (all_micros()["timm-vit"].model(), {*HEADS, "permute hidden units", "fold norm"}),
        (Layers(), set()),
    ):
        info = inspect_model(model)
        proof = SymmetryProof(info, None)
        blocks = [b for _, b in info.blocks if applicable(b)]
        assert set().union(*({s for s in RANDOM if proof(b, s)} for b in blocks)) == expected


def test_a_model_is_left_as_it_was() -> None:
    model = Layers("rotary", "gate").train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    proven(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_each_block_is_decided_once() -> None:
    model = Layers()
    info = inspect_model(model)
    proof = SymmetryProof(info, model)
    block = info.blocks[0][1]
    assert proof(block, "permute heads")
    model.blocks[0].attn.forward = None  # type: ignore[union-attr, assignment]
    assert proof(block, "rotate q and k")


def test_a_model_that_takes_no_input_is_judged_by_its_classes(tmp_path: Path) -> None:
    class Mute(Layers):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not now")

    # A block that takes one tensor alone is run alone; a model's refusal says nothing about it.
    assert set().union(*proven(Mute())) == {*HEADS, *HIDDEN}
    assert set().union(*proven(Mute("rotary", "gate"))) == {"permute heads", "rotate v and o"}


def test_the_first_image_that_can_be_read_is_taken() -> None:
    class Images:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            if index == 0:
                raise OSError("broken")
            return torch.full((3, 4, 4), float(index)), 0

    found = first_image(Images())  # type: ignore[arg-type]
    assert found is not None
    assert found.shape == (1, 3, 4, 4)
    assert float(found.mean()) == 1
    assert first_image([("text", 0)]) is None  # type: ignore[arg-type]


def test_the_file_and_the_commands_say_what_was_used_and_refused(tmp_path: Path) -> None:
    output = tmp_path / "swin.safetensors"
    small = ("img_size=64", "embed_dim=32", "window_size=4")
    arguments = [part for text in small for part in ("--model-arg", text)]
    spec = "timm:swin_tiny_patch4_window7_224"
    command = ("convert", spec, "--weights", "none", *arguments, "--scheme", "lors",
               "--rank", 4, "-o", output)  # fmt: skip
    found = figures(*command)["symmetries"]
    assert "permute heads" in found["refused"]
    assert "rotate q and k" in found["used"]
    printed = run("report", output).stdout
    assert re.search(r"not used, .*permute heads \(\d+ blocks\)", printed)
    assert re.search(r"used, .*rotate q and k \(\d+ blocks\)", printed)


def test_a_block_whose_state_holds_an_object_is_proven_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = proven(Layers())
    monkeypatch.setattr(FeedForward, "get_extra_state", lambda _: {"steps": 5})
    assert proven(Layers()) == expected


def test_a_fading_begins_at_the_original_whatever_proved_the_symmetries() -> None:
    """The conversion is repeated with the symmetries that its record names, not with new proofs."""
    model = ImageAndText().eval()
    g = torch.Generator().manual_seed(0)
    given = {
        "image": torch.randn(2, 9, 32, generator=g),
        "text": torch.randn(2, 1, 32, generator=g),
    }
    tied = tiedconv.convert(model, "tied", rank=4, example=given)
    assert "rotate v and o" in state_of(tied).history[0]["symmetries"]["used"]
    blend = OriginalBlend(tied, model)
    blend.begin()
    blend.set(1.0)
    with torch.no_grad():
        before, after = model(**given), tied(**given)
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
