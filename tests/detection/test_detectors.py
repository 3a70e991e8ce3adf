"""Query-based detectors of transformers, from a directory to a compact file and back."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering, slow_unless
from detectors import DETECTORS, SIDE
from error_codes import raises
from micro import all_detectors, settle
from safetensors.torch import load_file
from torch import Tensor, nn

import tiedconv
from tiedconv.calibration.activation_cache import Cache
from tiedconv.calibration.teacher_student import Pair
from tiedconv.core.plan import Plan
from tiedconv.errors import NothingToConvert, SourceError
from tiedconv.families import find_blocks
from tiedconv.families.inspect import inspect_model
from tiedconv.planning.recipe import Rule
from tiedconv.runtime.tie import state_of
from tiedconv.sources import open_source
from tiedconv.training.device import Placement

DECODER = "model.decoder.*"
FAST = ("hf-detr", "hf-dab-detr", "hf-deformable-detr")
each_detector = pytest.mark.parametrize("name", slow_unless(DETECTORS, FAST))


@dataclass(frozen=True)
class Made:
    """A detector's directory, its weights, and a compact file of half its decoder."""

    folder: Path
    original: nn.Module
    tied: nn.Module
    file: Path

    @property
    def plan(self) -> Plan:
        """Of the conversion."""
        return state_of(self.tied).plan


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where directories and files of this module lie."""
    return tmp_path_factory.mktemp("detectors")


@functools.cache
def made(root: Path, name: str) -> Made:
    """Converted once for all tests."""
    folder, file = root / name, root / f"{name}.safetensors"
    original = all_detectors()[name].model()
    original.save_pretrained(folder)
    spec = f"hf:{folder}"
    dry = tiedconv.plan(spec, "lors", include=DECODER)
    governed = sum(e.shape[0] * e.shape[1] for e in dry.weights.values())
    budget = str(dry.original - governed // 2)
    tied = tiedconv.convert(spec, "lors", include=DECODER, params=budget)
    assert state_of(tied).plan.stored <= int(budget)
    tiedconv.save(tied, file)
    return Made(folder, original, tied, file)


def answer(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits and boxes for two random images."""
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        found = model(pixel_values=images)
    return found.logits, found.pred_boxes


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two detectors give the same bits."""
    return all(map(torch.equal, answer(a), answer(b)))


def fresh(name: str) -> nn.Module:
    """The original class with other weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        return DETECTORS[name]().eval()


@pytest.mark.slow
@each_detector
def test_a_file_of_half_the_decoder_gives_the_same_logits_and_boxes(root: Path, name: str) -> None:
    it = made(root, name)
    back = tiedconv.load(it.file)
    assert same(back, it.tied)
    assert not same(back, it.original)  # else this says nothing
    assert type(tiedconv.untie(back)) is type(it.original)
    # Every layer of the decoder, each role for itself, and nothing else.
    assert all(n.startswith("model.decoder.layers.") for n in it.plan.weights)
    for group in it.plan.groups:
        names = [m.slot.tensor.split(".", 4) for m in group.members]
        assert [int(parts[3]) for parts in names] == [0, 1, 2] or "_pos" in group.name
        assert len({parts[4] for parts in names}) == 1, group.name
    roles = {n.removeprefix("model.decoder.layers.").split(".", 1)[1] for n in it.plan.weights}
    assert any("self_attn" in role for role in roles)
    assert any("mlp" in role for role in roles)


@pytest.mark.slow
@each_detector
def test_each_number_is_in_the_file_once(root: Path, name: str) -> None:
    it = made(root, name)
    stored = load_file(it.file)
    assert it.plan.stored == sum(t.numel() for n, t in stored.items() if n not in it.plan.buffers)
    assert it.plan.original == sum(p.numel() for p in it.original.parameters())
    before = it.original.state_dict()
    equal: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for key, tensor in stored.items():
        equal[tensor.dtype, tensor.shape, tensor.numpy().tobytes()].append(key)
    for first, *others in equal.values():
        for other in others:  # only what the original had twice: counters, constants
            assert torch.equal(before[first], before[other]), (first, other)


@each_detector
def test_only_the_decoder_changed_and_in_it_no_head(root: Path, name: str) -> None:
    it = made(root, name)
    loaded = tiedconv.load(it.file)
    now, before = tiedconv.untie(loaded).state_dict(), it.original.state_dict()
    assert now.keys() == before.keys()
    changed = {n for n, t in now.items() if not torch.equal(t, before[n])}
    assert it.plan.weights.keys() <= changed
    # Biases of freely moved heads and units move with them.
    moved = {n.removesuffix("weight") + "bias" for n in it.plan.weights}
    assert changed <= it.plan.weights.keys() | moved
    private = ("class_embed", "bbox_embed", "sampling_offsets", "attention_weights", "_head")
    assert not any(part in n for n in changed for part in private)


@each_detector
def test_what_the_original_shares_stays_shared(root: Path, name: str) -> None:
    it = made(root, name)
    aliases = inspect_model(it.original).aliases
    assert it.plan.aliases == aliases
    loaded = tiedconv.load(it.file)
    for model in (loaded, copy.deepcopy(loaded), tiedconv.untie(copy.deepcopy(loaded))):
        own = model.state_dict(keep_vars=True)
        assert all(own[alias] is own[first] for alias, first in aliases.items())


@each_detector
def test_a_dense_file_loads_into_the_original_class(root: Path, name: str, tmp_path: Path) -> None:
    it = made(root, name)
    tiedconv.export(it.file, tmp_path / "dense.safetensors")
    model = fresh(name)
    model.load_state_dict(load_file(tmp_path / "dense.safetensors"), strict=True)
    for got, wanted in zip(answer(model), answer(it.tied), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


OTHERS = list(itertools.product(["tied", "basis", "lowrank", "shared"], DETECTORS))


OTHERS_FAST = covering([case for case in OTHERS if case[1] in FAST], 1, 1)


@pytest.mark.parametrize(("scheme", "name"), slow_unless(OTHERS, OTHERS_FAST))
def test_other_schemes_convert_a_decoder_too(scheme: str, name: str) -> None:
    model = all_detectors()[name].model()
    tied = tiedconv.convert(model, scheme, include=DECODER)
    plan = state_of(tied).plan
    assert plan.stored < plan.original
    assert all(n.startswith("model.decoder.layers.") for n in plan.weights)
    assert all(torch.isfinite(part).all() for part in answer(tied))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf-conditional-detr", "hf-deimv2"])
def test_auto_halves_a_detector(name: str) -> None:
    tied = tiedconv.convert(all_detectors()[name].model(), "auto", params="50%")
    plan = state_of(tied).plan
    assert plan.stored <= plan.original / 2
    assert not any("_embed" in n or "_head" in n or "sampling" in n for n in plan.weights)


def test_heads_and_sampling_are_converted_when_a_pattern_of_their_own_names_them() -> None:
    model = all_detectors()["hf-d-fine"].model()
    private = {
        f"model.decoder.{name}"
        for i in range(3)
        for name in (
            f"class_embed.{i}.weight",
            *(f"bbox_embed.{i}.layers.{j}.weight" for j in range(3)),
            *(f"layers.{i}.encoder_attn.{part}.weight" for part in ("sampling_offsets",
              "attention_weights")),
        )
    }  # fmt: skip
    for wide in (["*"], [DECODER], ["model.*"], ["*.weight", "*.layers.*"]):
        assert not private & tiedconv.plan(model, "lowrank", include=wide).weights.keys()
    named = ["*class_embed*", "*decoder.bbox_embed*", "*.encoder_attn.*"]
    assert tiedconv.plan(model, "lowrank", include=named).weights.keys() == private
    both = tiedconv.plan(model, "lowrank", include=[DECODER, *named]).weights.keys()
    assert private < both
    left_out = tiedconv.plan(model, "lowrank", include=named, exclude=["*class*"]).weights
    assert left_out.keys() == {n for n in private if "class" not in n}
    stacks = {g.name: len(g.members) for g in tiedconv.plan(model, "lors", include=named).groups}
    assert stacks["model.decoder.bbox_embed.layers.0"] == 3
    assert stacks["model.decoder.layers.encoder_attn.offsets"] == 3


def test_a_narrower_rule_keeps_what_names_none_of_the_given() -> None:
    rule = Rule("lowrank", include=("*", "a.*", "b.c"), exclude=("b.d",))
    assert rule.without_patterns_matching(["a.b"]).include == ("b.c",)
    assert rule.without_patterns_matching(["a.b"]).exclude == ("b.d",)
    assert rule.without_patterns_matching([]).include == ("a.*", "b.c")  # stars alone name nothing


def test_shared_heads_are_converted_once_and_stay_shared(tmp_path: Path) -> None:
    model = all_detectors()["hf-deimv2"].model()
    aliases = inspect_model(model).aliases
    assert aliases["bbox_embed.1.layers.0.weight"] == "model.decoder.bbox_embed.1.layers.0.weight"
    tied = tiedconv.convert(model, "lors", include="*bbox_embed*")
    tiedconv.save(tied, tmp_path / "m.safetensors")
    back = tiedconv.load(tmp_path / "m.safetensors", model=fresh("hf-deimv2"))
    assert same(back, tied)
    dense = tiedconv.untie(back)
    assert inspect_model(dense).aliases == aliases
    assert same(dense, tied)


def test_verify_compares_boxes_too(root: Path) -> None:
    checks = {check.name: check for check in tiedconv.verify(made(root, "hf-rt-detr").file)}
    assert "logits and pred_boxes and" in checks["outputs"].detail


class Crossing(nn.Module):
    """A decoder layer's cross-attention to features of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.cross_attn = nn.MultiheadAttention(32, 4, kdim=24, vdim=24, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """`(n, q, 32)` and `(n, k, 24)` to `(n, q, 32)`."""
        x = x + self.cross_attn(x, features, features)[0]
        return x + self.linear2(self.linear1(x).relu())


def test_cross_attention_to_another_width() -> None:
    layers = nn.ModuleDict({"layers": settle(nn.ModuleList(Crossing() for _ in range(3)))})
    x, features = torch.randn(2, 5, 32), torch.randn(2, 7, 24)

    def run(model: nn.Module) -> Tensor:
        y = x
        with torch.no_grad():
            for layer in model.layers:  # type: ignore[union-attr]
                y = layer(y, features)
        return y

    layers = layers.eval()
    layers.layers = layers["layers"]
    tied = tiedconv.convert(layers, "lors", rank=10**6)
    assert sorted(g.name.partition("attn.")[2] for g in state_of(tied).plan.groups if
                  "attn" in g.name) == ["k", "o", "q", "v"]  # fmt: skip
    assert torch.allclose(run(tied), run(layers), atol=1e-4)


def test_rotary_positions_leave_heads_free_but_not_their_basis() -> None:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    info = inspect_model(DINOv3ViTModel(config))
    blocks = [b for _, b in find_blocks(info.shapes, info.hints) if b.kind == "attention"]
    assert blocks
    assert all(b.permutable and not b.rotatable for b in blocks)


# Directories: which class, which images, which backbone.

TINY = {
    "model_type": "detr", "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_queries": 8,
}  # fmt: skip
TIMM = {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": True}
NESTED = {"backbone_config": {"model_type": "timm_backbone", "use_pretrained_backbone": True,
                              "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}}  # fmt: skip


def directory(path: Path, **config: Any) -> str:
    """A directory that holds a configuration alone; its spec."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**TINY, **config}))
    return f"hf:{path}"


@pytest.mark.parametrize("backbone", [TIMM, NESTED], ids=["old", "nested"])
def test_a_pretrained_backbone_is_built_and_never_fetched(
    backbone: dict[str, Any], tmp_path: Path
) -> None:
    spec = directory(tmp_path / "model", **backbone)  # names no architecture, either
    tied = tiedconv.convert(spec, "lors", include=DECODER, weights="none")
    assert type(tiedconv.untie(copy.deepcopy(tied))).__name__ == "DetrForObjectDetection"
    tiedconv.save(tied, tmp_path / "m.safetensors")
    assert same(tiedconv.load(tmp_path / "m.safetensors"), tied)


def test_a_backbone_that_only_the_hub_knows_is_refused_in_words(tmp_path: Path) -> None:
    spec = directory(tmp_path, backbone="microsoft/resnet-50", use_timm_backbone=False)
    with raises(SourceError, "model-unreadable", "microsoft/resnet-50"):
        open_source(spec, weights="none")


LIMITED = {"shortest_edge": 800, "longest_edge": 1333}


@pytest.mark.parametrize(
    ("processor", "size"),
    [
        ({"size": LIMITED, "do_pad": True}, 800),
        ({"size": {"height": 640, "width": 640}, "do_normalize": False}, 640),
        ({"size": {"height": 320, "width": 320}, "do_pad": True, "pad_size": None}, 320),
        ({"size": 800, "max_size": 1333}, 800),
        (None, 640),
    ],
    ids=str,
)
def test_a_detectors_images_are_squares_from_which_nothing_is_cut(
    processor: dict[str, Any] | None, size: int, tmp_path: Path
) -> None:
    spec = directory(tmp_path, **TIMM)
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    _, source = open_source(spec, weights="none")
    assert source.preprocess is not None
    assert (source.preprocess.size, source.preprocess.resize) == (size, None)
    normalised = processor is None or processor.get("do_normalize", True)
    assert (source.preprocess.std[0] != 1.0) == normalised


def test_nothing_but_private_parts_is_nothing_to_convert() -> None:
    model = nn.ModuleDict({"class_embed": nn.ModuleList(nn.Linear(8, 5) for _ in range(3))})
    with raises(NothingToConvert, "nothing-to-convert"):
        tiedconv.plan(model, "lors")
    assert len(tiedconv.plan(model, "lors", include="class_embed.*").weights) == 3


def test_a_decoder_that_moves_boxes_is_calibrated_without_its_backbone(root: Path) -> None:
    it = made(root, "hf-deformable-detr-refined")
    original, tied = copy.deepcopy(it.original).eval(), tiedconv.load(it.file).eval()
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    placement = Placement.choose(tied, torch.device("cpu"), "off")
    pair = Pair.probed(tied, original, images, placement)
    (span,) = pair.spans
    assert span.around == "model.decoder"
    assert not span.from_images
    with torch.no_grad(), Cache(2**30) as cache:
        for side in (pair.student, pair.teacher):
            stream = side.stream(span, images, 2, cache)
            index = torch.arange(4)
            inside = side.outputs(span)(stream.take(index, placement))
            whole = dataclasses.replace(span, around="")
            outside = side.outputs(whole)([images])
            for a, b in zip(inside, outside, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
