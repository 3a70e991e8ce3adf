"""Progressive conversion: from the original to the compact model while it is trained."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import (
    MODEL_ARGS,
    QUICK,
    SPEC,
    World,
    files_of,
    refused,
    run,
    tiny_images,
    tiny_model,
)
from covering import covering, slow_unless
from error_codes import raises
from micro import all_micros, original_logits
from safetensors.torch import load_file
from torch import Tensor, nn

import tiedconv
from tiedconv.conversion.original_blend import OriginalBlend, conversion_recipe, moved_original
from tiedconv.data import TensorList
from tiedconv.errors import PlanError, UserError
from tiedconv.planning.budget import Budget
from tiedconv.planning.recipe import Recipe, Rule
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.tie import (
    clear_offsets,
    dense_state_dict,
    freeze,
    has_offsets,
    scale_offsets,
    set_offsets,
    set_state,
    state_of,
    untie,
)
from tiedconv.training import (
    Baseline,
    Checkpointed,
    EpochEnd,
    Event,
    TrainConfig,
    blend_weight,
    evaluate_model,
    train,
)

MODELS = ("timm-vit", "torchvision-resnet")
RECIPES: dict[str, dict[str, Any]] = {
    "tied": {"scheme": "tied"},
    "tied-groups": {"scheme": "tied", "groups": "adjacent:2"},
    "tied-budget": {"scheme": "tied", "params": "92%"},
    "lors": {"scheme": "lors", "rank": 2},
    "lowrank": {"scheme": "lowrank", "rank": 2},
    "basis": {"scheme": "basis", "params": "80%"},
    "auto": {"scheme": "auto", "params": "70%"},
}


def pair(name: str, recipe: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A tiny model and its compact form."""
    original = all_micros()[name].model(dtype)
    return original, tiedconv.convert(original, **RECIPES[recipe])


def offset_vit() -> tuple[nn.Module, dict[str, Tensor]]:
    """A compact ViT, and random offsets for all of its converted weights."""
    _, model = pair("timm-vit", "tied", torch.float32)
    weights = state_of(model).plan.weights
    return model, {name: torch.randn(expr.shape) for name, expr in weights.items()}


def weight_of(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    weight = getattr(model.get_submodule(path), attribute)
    assert isinstance(weight, Tensor)
    return weight


# --- offsets -----------------------------------------------------------------------------------


def test_a_weight_is_its_expression_plus_a_fraction_of_its_offset() -> None:
    model, offsets = offset_vit()
    pure = dense_state_dict(model)
    set_offsets(model, offsets)
    for share in (1.0, 0.25):
        scale_offsets(model, share)
        for name, offset in offsets.items():
            torch.testing.assert_close(weight_of(model, name), pure[name] + share * offset)
    assert scale_offsets(model, 0.0) == 0.25
    for name in offsets:
        assert torch.equal(weight_of(model, name), pure[name])
    assert has_offsets(model)
    clear_offsets(model)
    assert not has_offsets(model)
    assert scale_offsets(model, 1.0) == 0
    assert not [n for n, _ in model.named_buffers() if "tiedconv" in n]


def test_offsets_for_some_weights_only_and_for_those_that_the_model_shares() -> None:
    model = tiedconv.convert(all_micros()["aliased"].model(), "lors", rank=2)
    plan = state_of(model).plan
    shared = {name for alias, name in plan.aliases.items() if name in plan.weights}
    assert shared
    name = min(shared)
    before = {n: weight_of(model, n).clone() for n in plan.weights}
    set_offsets(model, {name: torch.ones(plan.weights[name].shape)})
    for n, value in before.items():
        torch.testing.assert_close(weight_of(model, n), value + 1 if n == name else value)
    for alias in (a for a, n in plan.aliases.items() if n == name):
        torch.testing.assert_close(weight_of(model, alias), before[name] + 1)


def test_offsets_are_in_no_state_dict_and_what_is_written_has_none(tmp_path: Path) -> None:
    model, offsets = offset_vit()
    tiedconv.save(model, tmp_path / "before.safetensors")
    before, pure = model.state_dict(), dense_state_dict(model)
    parameters = [name for name, _ in model.named_parameters()]
    set_offsets(model, offsets)
    assert model.state_dict().keys() == before.keys()
    assert [name for name, _ in model.named_parameters()] == parameters
    model.load_state_dict(before)
    assert has_offsets(model)
    tiedconv.save(model, tmp_path / "with.safetensors")
    files = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("before", "with")]
    assert files[0] == files[1]
    assert all(torch.equal(value, pure[n]) for n, value in dense_state_dict(model).items())
    plain = untie(model)
    assert not has_offsets(plain)
    assert all(torch.equal(value, pure[n]) for n, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "moved", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.train().eval()]
)
def test_offsets_go_along_with_copies(moved: Callable[[nn.Module], nn.Module]) -> None:
    model, offsets = offset_vit()
    set_offsets(model, offsets, 0.5)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    other = moved(model)
    assert torch.equal(other(x), expected)
    if other is not model:
        clear_offsets(other)
        assert torch.equal(model(x), expected)
        assert not torch.equal(other(x), expected)


def test_offsets_go_along_to_another_device_and_dtype() -> None:
    model, offsets = offset_vit()
    set_offsets(model, offsets)
    assert weight_of(model.to(torch.float64), min(offsets)).dtype == torch.float64
    assert weight_of(model.to("meta"), min(offsets)).is_meta


def test_offsets_have_no_gradient_and_factors_have() -> None:
    model, offsets = offset_vit()
    set_offsets(model, offsets)
    model(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for name in state_of(model).plan.factors:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().sum() > 0
    assert not any(b.requires_grad for b in model.buffers())


def test_a_model_with_offsets_is_not_cached_and_a_cached_one_computes_again() -> None:
    model, offsets = offset_vit()
    freeze(model)
    x = torch.randn(2, 3, 16, 16)
    compact = model(x)
    set_offsets(model, offsets)
    assert not torch.allclose(model(x), compact)
    with raises(UserError, "offsets-set"):
        freeze(model)
    clear_offsets(model)
    torch.testing.assert_close(freeze(model)(x), compact)


def test_offsets_must_fit() -> None:
    model, offsets = offset_vit()
    with raises(PlanError, "offset-mismatch", "head.weight"):
        set_offsets(model, {**offsets, "head.weight": torch.zeros(7, 32)})
    with raises(PlanError, "offset-mismatch", "(3, 3)"):
        set_offsets(model, {min(offsets): torch.zeros(3, 3)})
    assert not has_offsets(model)
    with raises(UserError, "not-tied"):
        set_offsets(untie(model), offsets)


# --- the original at one end, the compact model at the other -----------------------------------


BLENDED = list(itertools.product(MODELS, RECIPES))


@pytest.mark.parametrize(("name", "recipe"), slow_unless(BLENDED, covering(BLENDED, 2, 1)))
def test_it_begins_at_the_original_and_ends_at_the_compact_model(name: str, recipe: str) -> None:
    micro = all_micros()[name]
    original, model = pair(name, recipe)
    compact = micro.logits(model)
    expected = original_logits(name, torch.float64)
    assert not torch.allclose(compact, expected, atol=1e-3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    blend = OriginalBlend(model, original)
    torch.testing.assert_close(micro.logits(model), compact)
    blend.begin()
    # The moves themselves are made with SVDs and square roots, hence not to the last bit.
    torch.testing.assert_close(micro.logits(model), expected, atol=1e-6, rtol=1e-6)
    with blend.left_out():
        assert torch.equal(micro.logits(model), compact)
    blend.set(0.5)
    half = micro.logits(model)
    assert not torch.allclose(half, expected, atol=1e-3)
    assert not torch.allclose(half, compact, atol=1e-3)
    blend.set(0.0)
    assert torch.equal(micro.logits(model), compact)
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())
    # The original is left as it was.
    assert torch.equal(micro.logits(original), expected)


def test_kept_tensors_are_set_to_the_originals() -> None:
    """A calibration or a training changed them; the original's function needs its own."""
    micro = all_micros()["torchvision-resnet"]
    original, model = pair("torchvision-resnet", "tied")
    with torch.no_grad():
        for name in state_of(model).plan.kept:
            if model.state_dict()[name].is_floating_point():
                model.state_dict()[name].mul_(1.5)
    OriginalBlend(model, original).begin()
    expected = original_logits("torchvision-resnet", torch.float64)
    torch.testing.assert_close(micro.logits(model), expected, atol=1e-6, rtol=1e-6)


def test_a_recipe_that_leaves_the_choice_open() -> None:
    """Which groups `auto` took hangs on budget and images, and the moves on neither."""
    micro = all_micros()["timm-vit"]
    original, model = pair("timm-vit", "tied")
    recipe = Recipe.of("auto", params="60%").to_json()
    set_state(model, history=({"step": "convert", "recipe": recipe},))
    OriginalBlend(model, original).begin()
    expected = original_logits("timm-vit", torch.float64)
    torch.testing.assert_close(micro.logits(model), expected, atol=1e-6, rtol=1e-6)


def test_the_moves_matter() -> None:
    """Against weights that were not moved, the way from one end to the other is longer."""
    original, model = pair("timm-vit", "tied-groups")
    moved, dense, own = moved_original(model, original), dense_state_dict(model), original
    plain = own.state_dict()
    weights = state_of(model).plan.weights

    def distance(tensors: dict[str, Tensor]) -> float:
        return sum(float((tensors[n] - dense[n]).square().sum()) for n in weights)

    assert distance(moved) < 0.9 * distance(plain)
    errors = [(g.error or 0) for g in state_of(model).plan.groups]
    # What is left is what the conversion itself measured.
    sizes = {n: float(moved[n].square().sum()) for n in weights}
    assert distance(moved) <= max(errors) ** 2 * sum(sizes.values()) * 1.001


def test_a_recipe_is_read_back_from_the_history() -> None:
    recipe = Recipe(
        (
            Rule("lors", {"rank": 2, "k": [1, 2, 1]}, ("*attn*",), ("*norm*",)),
            Rule("tied", {"groups": "all"}),
        ),
        Budget("60%"),
    )
    entry = {"step": "convert", "recipe": json.loads(json.dumps(recipe.to_json()))}
    assert conversion_recipe([entry, {"step": "finetune"}]) == recipe


# --- errors ------------------------------------------------------------------------------------


def test_it_needs_the_original() -> None:
    original, model = pair("timm-vit", "tied")
    for teacher, code in (
        (None, "teacher-missing"),
        (model, "teacher-compact"),
        (all_micros()["torchvision-vit"].model(), "teacher-mismatch"),
    ):
        with raises(UserError, code):
            OriginalBlend(model, teacher)
    OriginalBlend(model, original)


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({}, "recipe-missing"),
        ({"recipe": {"params": None, "rules": []}}, "recipe-missing"),
        ({"recipe": {"params": 5, "rules": [{}]}}, "recipe-missing"),
        ({"recipe": {"params": None, "rules": [{"scheme": "tied"}]}}, "recipe-unknown"),
        ({"recipe": {**Recipe.of("tied").to_json(), "params": "lots"}}, "recipe-unknown"),
        ({"recipe": Recipe.of("tied", groups="all").to_json()}, "groups-mismatch"),
        ({"recipe": Recipe.of("lors").to_json()}, "groups-mismatch"),
        ({"recipe": Recipe.of("tied", include=["*mlp*"]).to_json()}, "groups-mismatch"),
        ({"recipe": Recipe.of("tied", include=["nothing"]).to_json()}, "conversion-fails"),
        ({"recipe": Recipe.of("auto", include=["*mlp*"]).to_json()}, "groups-mismatch"),
    ],
)
def test_a_conversion_that_can_not_be_made_again(entry: dict[str, Any], code: str) -> None:
    original, model = pair("timm-vit", "tied")
    set_state(model, history=({"step": "convert", **entry},))
    with raises(UserError, code):
        OriginalBlend(model, original)


def test_other_options_of_a_rule_are_no_recipe_either() -> None:
    original, model = pair("timm-vit", "tied")
    rule = {"scheme": "tied", "include": ["*"], "exclude": [], "warp": 9}
    set_state(model, history=({"step": "convert", "recipe": {"params": None, "rules": [rule]}},))
    with raises(UserError, "recipe-unknown"):
        OriginalBlend(model, original)


# --- training ----------------------------------------------------------------------------------


def test_the_share_that_is_left() -> None:
    shares = [blend_weight(step, 10, 0.5) for step in range(10)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[4] > 0
    assert shares[5:] == [0] * 5
    assert blend_weight(2, 8, 0.5) == pytest.approx(0.5)
    assert [blend_weight(step, 4, 0.0) for step in range(4)] == [0] * 4
    assert [blend_weight(step, 3, 0.01) for step in range(3)] == [1, 0, 0]
    assert blend_weight(9, 10, 1.0) > 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_checked(share: float) -> None:
    with raises(UserError, "invalid-training-option"):
        TrainConfig(progressive=share)


def test_training_without_anything_to_fade_is_refused() -> None:
    with raises(UserError, "blend-missing"):
        train(nn.Linear(1, 1), images(4), images(4), TrainConfig(progressive=0.5))


def images(count: int, seed: int = 0, side: int = 16, augment: str = "none") -> TensorList:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 7
    noise = torch.randn(count, 3, side, side, generator=generator)
    return TensorList(noise + labels.reshape(-1, 1, 1, 1) / 3, labels, augment=augment)


class Watched(OriginalBlend):
    """Notes what happens."""

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        super().__init__(model, original)
        self.shares: list[float] = []
        self.said: list[str] = []

    def begin(self) -> None:
        self.said.append("begin")
        super().begin()

    def set(self, share: float) -> None:
        self.shares.append(share)
        super().set(share)

    def left_out(self) -> AbstractContextManager[None]:
        @contextmanager
        def noted() -> Iterator[None]:
            with super(Watched, self).left_out():
                self.said.append("out")
                yield
                self.said.append("in")

        return noted()


CONFIG = TrainConfig(
    epochs=3, batch_size=14, lr=1e-3, progressive=0.8, seed=5, workers=0, bn_recalibrate=2
)


def test_training_fades_and_evaluates_the_compact_model() -> None:
    original, model = pair("timm-vit", "tied", torch.float32)
    blend = Watched(model, original)
    val = images(28, 1)
    compact = evaluate_model(copy.deepcopy(model), val, device="cpu")
    reported: list[Event] = []

    def listen(event: Event) -> None:
        reported.append(event)
        if isinstance(event, EpochEnd):
            # Measured again without the offsets, whatever their share is now.
            bare = copy.deepcopy(model)
            clear_offsets(bare)
            again = evaluate_model(bare, val, device="cpu")
            assert again.metrics == event.metrics
            assert has_offsets(model) == (event.epoch < 3)

    options: dict[str, Any] = {"teacher": original, "blend": blend, "device": "cpu"}
    result = train(model, images(42, augment="crop"), val, CONFIG, on_event=listen, **options)
    baseline = next(event for event in reported if isinstance(event, Baseline))
    assert baseline == Baseline(compact.metrics, pytest.approx(compact.loss))
    steps = result.steps
    assert blend.shares == [blend_weight(step, steps, 0.8) for step in range(steps)] + [0.0]
    assert blend.said == ["begin", *["out", "in"] * 3]
    assert not has_offsets(model)
    assert evaluate_model(model, val, device="cpu").top1 == result.top1


def test_an_evaluation_is_of_the_compact_model_within_left_out_and_of_the_blend_without() -> None:
    """By factors too, where a layer computes no weight to add an offset to."""
    original, model = pair("timm-vit", "lors", torch.float32)
    micro = all_micros()["timm-vit"]
    compact = micro.logits(model)
    assert apply_factors(model)
    blend = OriginalBlend(model, original)
    blend.begin()
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(micro.logits(model), micro.logits(original))
    blend.set(0.5)
    with torch.enable_grad():
        halfway = micro.forward(model.eval(), micro.input()).detach()
    close(micro.logits(model), halfway)
    assert (halfway - compact).abs().max() > 1e-3
    with blend.left_out():
        close(micro.logits(model), compact)
    close(micro.logits(model), halfway)


def test_the_first_step_is_that_of_the_original() -> None:
    """With only its teacher to follow, a model that is its teacher learns nothing yet."""
    losses = []
    for share in (1.0, 0.0):
        original, model = pair("timm-vit", "tied", torch.float32)
        blend = OriginalBlend(model, original)
        options: dict[str, Any] = {"teacher": original, "blend": blend, "device": "cpu"}
        config = TrainConfig(
            steps=1, batch_size=14, progressive=share, distill_weight=1.0, workers=0
        )
        losses.append(train(model, images(14), images(14, 1), config, **options).loss)
    assert losses[0] < 1e-4 < losses[1]


def test_the_offsets_are_gone_after_an_error() -> None:
    original, model = pair("timm-vit", "tied", torch.float32)

    def listen(event: Event) -> None:
        if isinstance(event, EpochEnd):
            raise KeyboardInterrupt

    options: dict[str, Any] = {"teacher": original, "device": "cpu", "on_event": listen}
    blend = OriginalBlend(model, original)
    with pytest.raises(KeyboardInterrupt):
        train(model, images(14), images(14, 1), CONFIG, blend=blend, **options)
    assert not has_offsets(model)


# After the first epoch the original is half there, after the second it is gone.
@pytest.mark.parametrize(
    ("name", "epoch"),
    slow_unless(list(itertools.product(MODELS, [1, 2])), [(MODELS[0], 1)]),
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str, epoch: int) -> None:
    config = TrainConfig(
        epochs=3, batch_size=14, lr=1e-3, progressive=0.6, workers=0, bn_recalibrate=2
    )
    side = all_micros()[name].input().shape[-1]
    data = images(28, side=side, augment="crop"), images(14, 1, side)

    def go(**options: Any) -> nn.Module:
        original, model = pair(name, "tied", torch.float32)
        blend = OriginalBlend(model, original)
        train(model, *data, config, teacher=original, blend=blend, device="cpu", **options)
        return model

    def interrupt(event: Event) -> None:
        ends.append(event) if isinstance(event, Checkpointed) else None
        if len(ends) == epoch:
            raise KeyboardInterrupt

    ends: list[Event] = []
    whole = go()
    with pytest.raises(KeyboardInterrupt):
        go(checkpoint_dir=tmp_path, on_event=interrupt)
    resumed = go(checkpoint_dir=tmp_path, resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# --- the command -------------------------------------------------------------------------------


def command(world: World, output: Path, *more: object) -> tuple[object, ...]:
    return (
        "finetune", world.tied, "--data", world.data, "-o", output, *QUICK, "--teacher",
        world.weights, "--progressive", 0.5, *more,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command(world: World, tmp_path: Path) -> None:
    out, plain = tmp_path / "out.safetensors", tmp_path / "plain.safetensors"
    run(*command(world, out, "--steps", 4))
    entry = tiedconv.report(out).history[-1]
    assert entry["options"]["progressive"] == 0.5
    assert "--progressive 0.5" in entry["command"]
    run(*command(world, plain, "--steps", 4, "--progressive", 0))
    assert tiedconv.report(plain).history[-1]["options"]["progressive"] == 0
    ours, theirs = load_file(out), load_file(plain)
    assert ours.keys() == theirs.keys() == load_file(world.tied).keys()
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    # The result's own accuracy, read back from the file that was written.
    assert entry["top1"] == tiedconv.evaluate(out, world.data, workers=0, device="cpu").result.top1
    run("verify", out)
    # And it can be done again: the history still tells how the file was converted.
    again = command(world, tmp_path / "again.safetensors", "--steps", 1)
    run(*[out if word == world.tied else word for word in again])


@pytest.mark.slow
def test_an_interrupted_command_goes_on(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tiedconv.training import engine

    whole, parts = tmp_path / "whole.safetensors", tmp_path / "parts.safetensors"
    run(*command(world, whole, "--epochs", 3))
    original = engine._Run.take

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.at.epoch == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(engine._Run, "take", interrupted)
    run(*command(world, parts, "--epochs", 3), code=130)
    monkeypatch.undo()
    run(*command(world, parts, "--epochs", 3), "--resume")
    ours, theirs = load_file(parts), load_file(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--teacher", "none"], "teacher-missing"),
        (["--teacher", "TIED"], "teacher-compact"),
        (["--progressive", "2"], "invalid-training-option"),
    ],
)
def test_the_command_refuses(options: list[str], code: str, world: World, tmp_path: Path) -> None:
    options = [str(world.tied) if word == "TIED" else word for word in options]
    refused(*command(world, tmp_path / "out.safetensors", *options), error_code=code)
    assert not files_of(tmp_path)


def test_the_command_fades_the_original_by_name(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--teacher auto` for a spec whose weights can be had again."""

    file = tmp_path / "auto.safetensors"
    run("convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "-o", file)
    asked: list[str] = []

    def opened(teacher: str, *_: Any, **__: Any) -> tuple[nn.Module, str]:
        asked.append(teacher)
        return tiny_model(), SPEC

    # By this way, as the package's own name `finetune` is the function.
    monkeypatch.setattr(import_module("tiedconv.commands.finetune_inputs"), "open_teacher", opened)
    seen: list[Tensor] = []
    begin = OriginalBlend.begin

    def watched(self: OriginalBlend) -> None:
        begin(self)
        with torch.no_grad():
            seen.append(self._model.eval()(tiny_images()))

    monkeypatch.setattr(OriginalBlend, "begin", watched)
    run(
        "finetune", file, "--data", world.data, "-o", tmp_path / "out.safetensors", *QUICK,
        "--progressive", 1, "--steps", 1,
    )  # fmt: skip
    assert asked == ["auto"]
    with torch.no_grad():
        torch.testing.assert_close(seen[0], tiny_model().eval()(tiny_images()), atol=1e-4, rtol=0)
