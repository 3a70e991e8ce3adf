"""The parts of the fine-tuning recipe: mixing, losses, averages, rates; and that each counts."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from covering import covering, slow_unless
from error_codes import raises
from hypothesis import given
from hypothesis import strategies as st
from micro import all_micros
from PIL import Image
from torch import Tensor, nn

import tiedconv
from tiedconv.conversion.original_blend import OriginalBlend
from tiedconv.data import ImageTransform, TensorList, train_transform
from tiedconv.data.seeds import epoch_seed, step_seed
from tiedconv.errors import DataError, UserError
from tiedconv.runtime.tie import dense_state_dict
from tiedconv.sources import Preprocess
from tiedconv.training import (
    Blocks,
    Checkpointed,
    Ema,
    Event,
    Mix,
    Objective,
    TrainConfig,
    TrainResult,
    distillation_loss,
    evaluate_model,
    feature_loss,
    fit_inputs,
    hard_distillation_loss,
    learning_rate,
    parameter_groups,
    train,
)
from tiedconv.training.device import Placement
from tiedconv.training.losses import training_loss
from tiedconv.training.optim import SCALE, make_optimizer, set_learning_rate

CPU = Placement(torch.device("cpu"))
QUICK = TrainConfig(epochs=2, batch_size=8, lr=1e-3, seed=3, augment="none")
LIBRARIES = ["torchvision-vit", "timm-vit", "hf-vit", "torchvision-resnet", "timm-resnet",
             "hf-resnet", "hf-imagegpt", "torch-encoder", "convmixer"]  # fmt: skip
ViT = {"torchvision-vit": "encoder.layers.encoder_layer_", "timm-vit": "blocks.",
       "hf-vit": "vit.layers."}  # fmt: skip


def vit(scheme: str | None = None, **options: Any) -> nn.Module:
    """timm's micro ViT, converted if a scheme is named."""
    model = all_micros()["timm-vit"].model()
    return tiedconv.convert(model, scheme, **options) if scheme else model


def images(count: int = 24, seed: int = 0, **options: Any) -> TensorList:
    """Noise on three grounds, which are the labels."""
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return TensorList(noise + labels.reshape(-1, 1, 1, 1) / 3, labels, **options)


def run(model: nn.Module, config: TrainConfig = QUICK, **options: Any) -> TrainResult:
    """A short training on the CPU."""
    options = {"train_data": images(), "val_data": images(12, 1), "device": "cpu"} | options
    return train(model, config=config, **options)


def objective(config: TrainConfig, student: nn.Module, teacher: nn.Module | None) -> Objective:
    """An objective on the CPU."""
    return Objective(config, student, student, teacher, None, CPU)


# --- mixing ------------------------------------------------------------------------------------

alphas = st.floats(0.1, 4)
seeds = st.integers(0, 2**63)


@given(alphas, st.booleans(), seeds, st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
def test_mixing_keeps_the_mean_image_and_the_mean_label(
    alpha: float, cuts: bool, seed: int, count: int, height: int, width: int
) -> None:
    pixels = torch.rand(count, 2, height, width, dtype=torch.float64)
    labels = torch.randint(0, 4, (count,))
    before = pixels.clone()
    mix = Mix.draw(0 if cuts else alpha, alpha if cuts else 0, pixels.shape, seed)
    mixed, shares = mix.images(pixels), mix.labels(labels, 4)
    assert 0 <= mix.lam <= 1
    assert sorted(mix.perm) == list(range(count))
    torch.testing.assert_close(mixed.mean(0), pixels.mean(0))
    torch.testing.assert_close(shares.mean(0), F.one_hot(labels, 4).float().mean(0))
    torch.testing.assert_close(shares.sum(1), torch.ones(count))
    assert shares.min() >= 0
    assert torch.equal(pixels, before)
    again = Mix.draw(0 if cuts else alpha, alpha if cuts else 0, pixels.shape, seed)
    assert mix == again


@given(alphas, seeds)
def test_mixup_is_a_blend_and_cutmix_a_patch(alpha: float, seed: int) -> None:
    pixels = torch.rand(5, 1, 8, 6, dtype=torch.float64)
    shape = pixels.shape
    blend, cut = Mix.draw(alpha, 0, shape, seed), Mix.draw(0, alpha, shape, seed)
    for i, (image, out) in enumerate(zip(pixels, blend.images(pixels), strict=True)):
        partner = pixels[blend.perm[i]]
        torch.testing.assert_close(out, blend.lam * image + (1 - blend.lam) * partner)
    own = torch.arange(5.0).reshape(5, 1, 1, 1).expand(shape)
    came = cut.images(own)  # whose pixel is where
    for i, out in enumerate(came):
        if cut.perm[i] != i:
            assert (out == i).double().mean().item() == pytest.approx(cut.lam)
    moved = [i for i in range(5) if cut.perm[i] != i]
    patches = [(came[i] != i) for i in moved]
    assert all(torch.equal(patch, patches[0]) for patch in patches)


def test_the_share_follows_alpha_and_both_kinds_take_turns() -> None:
    shape = torch.Size((4, 3, 32, 32))
    drawn = [Mix.draw(0.8, 1.0, shape, seed) for seed in range(400)]
    blended = [mix.lam for mix in drawn if mix.box is None]
    assert 160 < len(blended) < 240
    # Beta(a, a) has mean 1/2 and variance 1 / (8 a + 4).
    assert np.mean(blended) == pytest.approx(0.5, abs=0.06)
    assert np.var(blended) == pytest.approx(1 / (8 * 0.8 + 4), rel=0.25)
    assert len({mix.perm for mix in drawn}) == math.factorial(4)


def test_seeds_of_steps_are_not_those_of_epochs() -> None:
    steps = {step_seed(0, step) for step in range(50)}
    assert len(steps) == 50
    assert not steps & {epoch_seed(0, epoch) for epoch in range(-50, 50)}
    assert step_seed(0, 1, rank=1) not in steps


# --- augmentation ------------------------------------------------------------------------------


def test_erasing_of_files_and_of_tensors() -> None:
    """A rectangle of 2 to 33 % is set to the mean in about so many images, at all places."""
    transform = train_transform(Preprocess(24, None), "none", 0.4)
    assert transform == ImageTransform(24, None, transform.mean, transform.std,
                                       transform.interpolation, erasing=0.4)  # fmt: skip
    white = Image.new("RGB", (24, 24), (255, 255, 255))
    made = torch.stack([transform(white) for _ in range(300)])
    listed = TensorList(torch.ones(300, 3, 24, 24), [0] * 300, mean=[0.5], std=[0.5], erasing=0.4)
    tensors, _ = listed.read_batch(range(300), range(300))
    for batch in (made, tensors):
        gone = (batch.abs() < 0.01).all(1)  # of files the nearest byte
        share = gone.double().mean((1, 2))
        erased = share > 0
        assert 0.3 < erased.double().mean() < 0.5
        # Rounded to whole pixels, and cut off where the patch is longer than the image.
        assert 0.005 < share[erased].min() < share[erased].max() < 0.36
        assert gone.any(0).double().mean() > 0.98  # corners are seldom
        for mask in gone[erased][:20]:
            rows, columns = mask.any(1), mask.any(0)
            assert torch.equal(mask, rows[:, None] & columns[None, :])
            assert rows.sum() == np.ptp(np.flatnonzero(rows)) + 1
    again, _ = listed.read_batch([7], [7])
    assert torch.equal(again[0], tensors[7])


def test_erasing_moves_no_other_draw() -> None:
    plain, erased = images(augment="crop"), images(augment="crop", erasing=1.0)
    one, _ = plain.read_batch(range(24), range(24))
    other, _ = erased.read_batch(range(24), range(24))
    kept = other != 0
    assert torch.equal(one[kept], other[kept])
    assert not kept.all()


def test_what_needs_image_files_is_refused_for_tensors() -> None:
    with raises(UserError, "augmentation-needs-files"):
        images(augment="trivialaugment")
    with raises(UserError, "invalid-erasing"):
        images(erasing=1.5)
    with raises(UserError, "invalid-erasing"):
        train_transform(Preprocess(8), "crop", math.nan)


# --- losses ------------------------------------------------------------------------------------


def test_hard_distillation_is_cross_entropy_with_the_teachers_choice() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    chosen = teacher.argmax(1)
    expected = -student.log_softmax(1)[torch.arange(5), chosen].mean()
    torch.testing.assert_close(hard_distillation_loss(student, teacher), expected)
    with raises(UserError, "teacher-mismatch", "3 outputs", "model 4"):
        hard_distillation_loss(student, teacher[:, :3])
    labels = torch.tensor([0, 1, 2, 3, 0])
    config = TrainConfig(distillation="hard", distill_weight=0.5)
    both = 0.5 * F.cross_entropy(student, labels) + 0.5 * expected
    torch.testing.assert_close(training_loss(student, labels, teacher, config), both)


@given(st.floats(0, 1), st.floats(0, 0.9), seeds)
def test_smoothed_mixed_labels_are_the_textbooks(share: float, smooth: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, labels = torch.randn(6, 5), torch.randint(0, 5, (6,))
    mix = Mix((3, 4, 5, 0, 1, 2), share)
    config = TrainConfig(label_smoothing=smooth)
    loss = training_loss(logits, mix.labels(labels, 5), None, config)
    own, other = F.one_hot(labels, 5), F.one_hot(labels[list(mix.perm)], 5)
    wanted = (1 - smooth) * (share * own + (1 - share) * other) + smooth / 5
    torch.testing.assert_close(loss, -(wanted * logits.log_softmax(1)).sum(1).mean())


@given(st.floats(0.01, 100), seeds)
def test_the_feature_loss_is_relative(scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    own = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 3, 4)}
    aims = {name: torch.randn(2, 3, 4) for name in own}
    expected = sum(((own[n] - aims[n]) ** 2).sum() / (aims[n] ** 2).sum() for n in own) / 2
    torch.testing.assert_close(feature_loss(own, aims), expected)
    scaled = [{"a": side["a"] * scale, "b": side["b"]} for side in (own, aims)]
    torch.testing.assert_close(feature_loss(*scaled), expected, rtol=1e-4, atol=1e-5)
    assert feature_loss(aims, aims) == 0
    with raises(UserError, "teacher-mismatch", "Block a", "(2, 3, 4)"):
        feature_loss(own, {"a": aims["a"][..., :2], "b": aims["b"]})


# --- the objective -----------------------------------------------------------------------------


def test_the_objective_by_hand() -> None:
    """Mixed images, soft targets, features and label smoothing, put together by hand."""
    student, teacher = vit("tied").train(), vit().eval()
    pixels, labels = images(8).read_batch(range(8), range(8))
    config = TrainConfig(mixup=0.8, cutmix=1.0, features=0.3, distill_weight=0.6,
                         label_smoothing=0.1, temperature=3.0)  # fmt: skip
    for seed in (1, 2, 3):
        found = objective(config, student, teacher)(pixels, labels, seed)
        mix = Mix.draw(0.8, 1.0, pixels.shape, seed)
        x, target = mix.images(pixels), mix.labels(labels, 7)
        own, aims, logits = [], [], []
        for model, outputs in ((student, own), (teacher, aims)):
            hidden = model._pos_embed(model.patch_embed(x))
            for block in model.blocks:
                hidden = block(hidden)
                outputs.append(hidden)
            logits.append(model.head(model.norm(hidden)[:, 0]))
        loss = 0.4 * F.cross_entropy(logits[0], target, label_smoothing=0.1)
        loss = loss + 0.6 * distillation_loss(logits[0], logits[1], 3.0)
        distances = [
            (s - t).square().sum() / t.square().sum() for s, t in zip(own, aims, strict=True)
        ]
        loss = loss + 0.3 * sum(distances) / 3
        torch.testing.assert_close(found.loss, loss)
        torch.testing.assert_close(found.logits, logits[0])
        found.loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks for model in (student, teacher) for m in model.modules())


def test_the_forward_may_be_a_wrapper_around_the_student() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.module(x)
            return out

    student, teacher = vit("tied"), vit()
    wrapper = Wrapper(student)
    pixels, labels = images(4).read_batch(range(4), range(4))
    config = TrainConfig(features=1.0)
    wrapped = Objective(config, wrapper, student, teacher, 7, CPU)(pixels, labels, 0)
    assert wrapper.calls == 1
    torch.testing.assert_close(wrapped, objective(config, student, teacher)(pixels, labels, 0))


def test_both_run_under_autocast_and_the_loss_is_single() -> None:
    seen: list[torch.dtype] = []
    student, teacher = vit("tied"), vit()
    for model in (student, teacher):
        model.blocks[1].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    pixels, labels = images(4).read_batch(range(4), range(4))
    config = TrainConfig(features=0.5, mixup=0.4)
    half = Placement(torch.device("cpu"), autocast_in=torch.bfloat16)
    found = Objective(config, student, student, teacher, 7, half)(pixels, labels, 0)
    assert seen == [torch.bfloat16] * 2
    assert (found.loss.dtype, found.logits.dtype) == (torch.float32, torch.float32)
    whole = objective(config, student, teacher)(pixels, labels, 0)
    torch.testing.assert_close(found.loss, whole.loss, rtol=0.05, atol=0.05)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in student.parameters())


def test_a_teacher_sees_images_as_it_was_trained_to() -> None:
    """Prepared for one and handed to the other, they are what the other's own way gives."""
    one = Preprocess(16, None, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    other = Preprocess(16, None, (0.1, 0.2, 0.6), (0.5, 0.6, 0.7))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    mine, theirs = (train_transform(p, "none")(picture)[None] for p in (one, other))
    seen = nn.Identity()
    fit_inputs(seen, one, other)
    torch.testing.assert_close(seen(mine), theirs, rtol=1e-5, atol=1e-5)
    assert seen(mine.bfloat16()).dtype == torch.bfloat16
    larger = nn.Identity()
    fit_inputs(larger, one, Preprocess(24, None, one.mean, one.std))
    assert larger(mine).shape == (1, 3, 24, 24)
    torch.testing.assert_close(larger(torch.ones_like(mine)), torch.ones(1, 3, 24, 24))
    same = nn.Identity()
    fit_inputs(same, one, one)
    assert not same._forward_pre_hooks


def test_a_teacher_without_weight_is_not_run() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("the teacher was asked")

    pixels, labels = images(4).read_batch(range(4), range(4))
    objective(TrainConfig(distill_weight=0), vit(), Silent())(pixels, labels, 0)


def test_options_that_would_do_nothing_are_refused() -> None:
    for options, reported in (({"features": 0.1}, "features is 0.1"),
                          ({"distillation": "hard"}, "distillation is hard")):  # fmt: skip
        with raises(UserError, "teacher-missing", reported):
            run(vit(), replace(QUICK, **options))
    features = replace(QUICK, features=0.1)
    with raises(UserError, "no-numbered-blocks"):
        run(nn.Sequential(nn.Flatten()), features, teacher=vit())
    with raises(UserError, "teacher-mismatch", "3 blocks", "teacher 7", "blocks.0"):
        run(vit("tied"), features, teacher=all_micros()["timm-resnet"].model())
    from timm.models.vision_transformer import VisionTransformer

    wide = VisionTransformer(16, 8, num_classes=7, embed_dim=48, depth=3, num_heads=2)
    with raises(UserError, "teacher-mismatch", "blocks.0", "(2, 5, 32)"):
        run(vit("tied"), features, teacher=wide)
    with raises(UserError, "no-numbered-blocks", "layer_decay is 0.5"):
        run(nn.Sequential(nn.Conv2d(3, 3, 16), nn.Flatten()), replace(QUICK, layer_decay=0.5))
    with raises(DataError, "classes-mismatch", "3 classes", "2 outputs"):
        objective(QUICK, nn.Sequential(nn.Flatten(), nn.Linear(768, 2)), None)(
            *images(8).read_batch(range(8), range(8)), 0
        )


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"ema": 1.0}, "ema is 1.0. Choose 0 or more and less than 1"),
        ({"ema": -0.1}, r"ema is -0.1. Choose 0 or more"),
        ({"ema": math.nan}, r"ema is nan"),
        ({"layer_decay": 0.0}, r"layer_decay is 0.0. Choose more than 0 and at most 1"),
        ({"layer_decay": 1.1}, r"layer_decay is 1.1"),
        ({"erasing": 2.0}, r"erasing is 2.0. Choose 0 or more and at most 1"),
        ({"mixup": -1.0}, r"mixup is -1.0. Choose 0 or more"),
        ({"cutmix": math.inf}, r"cutmix is inf"),
        ({"features": -1.0}, r"features is -1.0"),
        ({"distillation": "warm"}, r"distillation is 'warm'. Choose one of soft, hard"),
        ({"augment": "autoaugment"}, r"augment is 'autoaugment'"),
    ],
)
def test_options_are_checked(options: dict[str, Any], shown: str) -> None:
    with raises(UserError, "invalid-training-option", shown):
        TrainConfig(**options)


# --- averaged weights --------------------------------------------------------------------------


@given(st.floats(0, 0.999), st.integers(1, 25))
def test_the_average_is_the_closed_form(decay: float, steps: int) -> None:
    model = nn.Linear(3, 2).double()
    ema = Ema(model, decay)
    weight = model.weight.detach().clone()
    for step in range(steps):
        with torch.no_grad():
            model.weight.normal_(generator=torch.Generator().manual_seed(step))
        used = min(decay, (1 + step) / (10 + step))
        weight = used * weight + (1 - used) * model.weight.detach()
        ema.update()
    assert ema.updates == steps
    torch.testing.assert_close(ema.averages["weight"], weight)


@pytest.mark.parametrize("scheme", ["tied", "lors", "shared"])
def test_each_stored_number_is_averaged_once(scheme: str) -> None:
    model = vit(scheme)
    ema = Ema(model, 0.9)
    assert sum(a.numel() for a in ema.averages.values()) == tiedconv.report(model).stored
    assert ema.averages.keys() == model.state_dict().keys()


def test_swapping_is_exact_and_settling_is_what_was_evaluated() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    model(torch.rand(2, 1, 5, 5))
    model[0].weight.requires_grad_(False)
    ema = Ema(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
    ema.update()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), ema.swapped():  # noqa: PT012
        assert torch.equal(model[1].weight, ema.averages["1.weight"])
        assert torch.equal(model[1].running_mean, before["1.running_mean"])
        model[1].running_mean.fill_(7)
        evaluated = copy.deepcopy(model.state_dict())
        raise ZeroDivisionError
    assert addresses == [p.data_ptr() for p in model.parameters()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert (name in ema.averages) is (name[2:] in ("weight", "bias") and name != "0.weight")
    fresh = Ema(model, 0.9)
    fresh.load_state_dict(copy.deepcopy(ema.state_dict()))
    fresh.settle()
    for name, value in model.state_dict().items():
        assert torch.equal(value, evaluated[name])
    with pytest.raises(KeyError):
        fresh.load_state_dict({"averages": {}, "buffers": {}, "updates": 1})


def test_half_precision_is_averaged_in_single() -> None:
    model = nn.Linear(2, 2, bias=False).bfloat16()
    ema = Ema(model, 0.999)
    ema.updates = 10**6
    before = ema.averages["weight"].clone()
    with torch.no_grad():
        model.weight += 0.25
    ema.update()
    torch.testing.assert_close(ema.averages["weight"] - before, torch.full((2, 2), 0.25e-3),
                               rtol=0.1, atol=0)  # fmt: skip
    with ema.swapped():
        assert model.weight.dtype == torch.bfloat16


def test_a_training_evaluates_and_keeps_the_averages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ties hold in them, the file has each once, and the last evaluation is of them."""
    raw, averaged = vit("tied"), vit("tied")
    seen: list[dict[str, Tensor]] = []
    update = Ema.update

    def watched(self: Ema) -> None:
        update(self)
        seen.append({n: p.detach().clone() for n, p in averaged.named_parameters()})

    evaluated: list[Tensor] = []

    def before(module: nn.Module, args: Any) -> None:
        if not module.training:
            evaluated.append(module.head.weight.detach().clone())

    averaged.register_forward_pre_hook(before)
    monkeypatch.setattr(Ema, "update", watched)
    run(raw)
    result = run(averaged, replace(QUICK, ema=0.5))
    start = vit("tied").state_dict()
    for name in start:
        value = start[name]
        for step, state in enumerate(seen):
            used = min(0.5, (1 + step) / (10 + step))
            value = used * value + (1 - used) * state[name]
        torch.testing.assert_close(averaged.state_dict()[name], value)
        # Averaging changes nothing of the training itself.
        assert torch.equal(seen[-1][name], raw.state_dict()[name])
    assert torch.equal(evaluated[-1], averaged.head.weight)
    assert not torch.equal(averaged.head.weight, raw.head.weight)
    dense = dense_state_dict(averaged)
    q, o = dense["blocks.0.attn.qkv.weight"][:32], dense["blocks.0.attn.proj.weight"]
    scaled = averaged.get_parameter("tied/blocks/0/attn/q-o/s1")
    rows = averaged.get_parameter("tied/blocks/0/attn/q-o/t1")
    torch.testing.assert_close(o.T, q * scaled * rows)
    path = tmp_path / "averaged.safetensors"
    tiedconv.save(averaged, path)
    again = tiedconv.load(path, model=vit())
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in averaged.state_dict().items())
    top1 = evaluate_model(again, images(12, 1), device="cpu").top1
    assert top1 == result.top1


# --- groups and rates --------------------------------------------------------------------------


def scales_of(model: nn.Module, decay: float) -> dict[str, float]:
    """Parameter name to what its rate is multiplied by."""
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1, decay)
    assert len({id(p) for g in groups for p in g["params"]}) == len(names)
    return {names[id(p)]: g[SCALE] for g in groups for p in g["params"]}


@pytest.mark.parametrize("name", LIBRARIES)
def test_rates_rise_from_the_input_to_the_output(name: str) -> None:
    model = all_micros()[name].model()
    scales = scales_of(model, 0.5)
    blocks = Blocks.of(model)
    order = list(scales_of(model, 1.0))
    assert set(order) == set(scales)
    assert {scales[n] for n in order} <= {0.5**k for k in range(len(blocks.names) + 2)}
    *_, last = dict(model.named_parameters())
    assert scales[last] == 1.0  # the classifier
    for depth, block in enumerate(blocks.names, 1):
        inside = [s for n, s in scales.items() if n.startswith(f"{block}.")]
        assert inside
        assert set(inside) == {0.5 ** (blocks.top - depth)}
    first = [s for n, s in scales.items() if "embed" in n or "token" in n or n == "conv1.weight"]
    assert set(first) <= {0.5**blocks.top}
    assert scales_of(model, 1.0) == dict.fromkeys(order, 1.0)


def test_blocks_are_those_of_the_model() -> None:
    for name, prefix in ViT.items():
        assert Blocks.of(all_micros()[name].model()).names == tuple(
            f"{prefix}{i}" for i in range(3)
        )
    found = Blocks.of(all_micros()["torchvision-resnet"].model()).names
    assert found == ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2")
    stages = Blocks.of(all_micros()["hf-resnet"].model()).names
    assert stages[2] == "resnet.encoder.stages.1.layers.0"
    assert len(stages) == 5


RATED = list(
    itertools.product([*ViT, "torchvision-resnet"], ["tied", "lors", "basis", "lowrank", "shared"])
)


@pytest.mark.parametrize(("name", "scheme"), slow_unless(RATED, covering(RATED, 1, 1)))
def test_stored_tensors_have_the_rates_of_the_layers_that_use_them(name: str, scheme: str) -> None:
    """Compared with the plan, of which the training knows nothing."""
    try:
        model = tiedconv.convert(all_micros()[name].model(), scheme)
    except UserError:
        pytest.skip("nothing to convert")
    dense = scales_of(all_micros()[name].model(), 0.7)
    scales = scales_of(model, 0.7)
    plan = tiedconv.runtime.tie.state_of(model).plan
    for factor in plan.factors:
        used = {dense[weight] for weight, expr in plan.weights.items() if factor in expr.refs}
        assert scales[factor] == pytest.approx(sum(used) / len(used))
    assert all(scales[name] == dense[name] for name in plan.kept if name in scales)


def test_shared_tensors_have_the_mean_rate_and_cached_weights_do_no_harm() -> None:
    model = vit("lors")
    base = "tied/blocks/attn/qkv/base"
    expected = scales_of(model, 0.5)
    assert expected[base] == pytest.approx((0.125 + 0.25 + 0.5) / 3)
    assert expected["tied/blocks/attn/qkv/B2"] == 0.5
    assert scales_of(tiedconv.freeze(model), 0.5) == expected
    assert not model.training
    aliased = scales_of(all_micros()["aliased"].model(), 0.5)
    assert aliased["layers.1.norm1.weight"] == pytest.approx((0.5**3 + 0.5) / 2)


def test_no_decay_for_scales_mixes_norms_and_embeddings() -> None:
    def spared(model: nn.Module) -> set[str]:
        names = {id(p): n for n, p in model.named_parameters()}
        *_, others = parameter_groups(model, 0.1)
        assert others["weight_decay"] == 0
        return {names[id(p)] for p in others["params"]}

    tied = vit("tied")
    factors = {n for n in dict(tied.named_parameters()) if n.startswith("tied/")}
    assert factors & spared(tied) == {n for n in factors if n[-2:] in ("s1", "t1")}
    assert "tied/blocks/attn/qkv/mix" in spared(vit("lors", bases=2))
    layer_scale = all_micros()["timm-vit-qknorm"].model()
    assert "blocks.0.ls1.gamma" in spared(layer_scale)
    for name, parts in (("torchvision-vit", ("class_token", "pos_embedding")),
                        ("hf-deit", ("cls_token", "distillation_token", "position_embeddings")),
                        ("hf-imagegpt", ("wpe.weight",)),
                        ("timm-deit", ("cls_token", "dist_token", "pos_embed"))):  # fmt: skip
        left = spared(all_micros()[name].model())
        assert all(any(part in n for n in left) for part in parts)
        assert all(n.endswith("bias") or "norm" in n or "ln" in n
                   or any(part in n for part in parts) for n in left)  # fmt: skip


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_fused_update_is_the_plain_one(kind: str) -> None:
    """In the layouts that the training uses, over some steps, group by group."""
    config = replace(QUICK, optimizer=kind, weight_decay=0.1, layer_decay=0.6)
    models = [all_micros()["torchvision-resnet"].model() for _ in range(2)]
    for model in models:
        Placement(torch.device("cpu"), channels_last=True).place(model)
    fused = make_optimizer(models[0], config)
    assert all(group["fused"] for group in fused.param_groups)
    groups = parameter_groups(models[1], 0.1, 0.6)
    plain = (
        torch.optim.SGD(groups, 1.0, momentum=0.9, nesterov=True, foreach=False)
        if kind == "sgd" else torch.optim.AdamW(groups, 1.0, foreach=False)
    )  # fmt: skip
    for step in range(4):
        rate = learning_rate(step, 4, config)
        for model, optimizer in zip(models, (fused, plain), strict=True):
            set_learning_rate(optimizer, rate)
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).contiguous(
                    memory_format=torch.channels_last if p.ndim == 4 else torch.contiguous_format
                )
            optimizer.step()
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# --- the whole training ------------------------------------------------------------------------

EACH: dict[str, dict[str, Any]] = {
    "mixup": {"mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
    "alpha": {"mixup": 0.2},
    "both": {"mixup": 0.8, "cutmix": 1.0},
    "smoothing": {"label_smoothing": 0.1},
    "hard": {"distillation": "hard"},
    "temperature": {"temperature": 1.0},
    "distill": {"distill_weight": 0.8},
    "features": {"features": 0.1},
    "ema": {"ema": 0.9},
    "layer_decay": {"layer_decay": 0.8},
    "weight_decay": {"weight_decay": 0.5},
    "optimizer": {"optimizer": "sgd"},
    "seed": {"seed": 4},
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Tensor]:
    """All weights after a short training, by the option that was changed."""
    found = {}
    for name, options in {"": {}, "again": {}, **EACH}.items():
        model = vit("tied")
        run(model, replace(QUICK, epochs=None, steps=4, eval_every_epoch=False, **options),
            teacher=vit())  # fmt: skip
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
    return found


@pytest.mark.slow
def test_every_option_counts(outcomes: dict[str, Tensor]) -> None:
    assert torch.equal(outcomes[""], outcomes["again"])
    names = [name for name in outcomes if name != "again"]
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not torch.equal(outcomes[one], outcomes[other]), (one, other)
        assert bool(outcomes[one].isfinite().all())


def test_each_step_has_the_rates_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        seen.append(sorted({group["lr"] for group in self.param_groups}))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    config = replace(QUICK, layer_decay=0.5)
    run(vit("tied"), config)
    rates = [learning_rate(at, 6, config) for at in range(6)]
    assert seen == [[rate * 0.5**depth for depth in (4, 3, 2, 1, 0)] for rate in rates]


def test_each_step_mixes_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Mix] = []
    draw = Mix.draw.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Mix], *args: Any) -> Mix:
        drawn.append(draw(cls, *args))
        return drawn[-1]

    monkeypatch.setattr(Mix, "draw", classmethod(watched))
    for seed in (0, 0, 1):
        run(vit("tied"), replace(QUICK, mixup=1.0, seed=seed))
    # Each run begins with a trial, which mixes as well.
    first, again, other = drawn[1:7], drawn[8:14], drawn[15:]
    assert first == again
    assert len({mix.lam for mix in first + other}) == 12


class Interruption(KeyboardInterrupt):
    pass


def interrupt_at_checkpoint(event: Event) -> None:
    if isinstance(event, Checkpointed):
        raise Interruption


@pytest.mark.parametrize(
    ("name", "progressive"),
    [
        ("timm-vit", 0.7),
        ("torchvision-resnet", 0.0),
        pytest.param("timm-vit", 0.0, marks=pytest.mark.slow),
        pytest.param("torchvision-resnet", 0.7, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, name: str, progressive: float
) -> None:
    """With averages, mixed images, features and rates by layer; batch norms in the ResNet."""
    config = replace(QUICK, ema=0.9, mixup=0.4, cutmix=1.0, features=0.1, layer_decay=0.8,
                     label_smoothing=0.1, bn_recalibrate=2, progressive=progressive)  # fmt: skip
    original = all_micros()[name].model()

    def fresh() -> nn.Module:
        return tiedconv.convert(all_micros()[name].model(), "tied")

    def trained(model: nn.Module, **more: Any) -> TrainResult:
        blend = OriginalBlend(model, original) if progressive else None
        data = images(augment="crop")
        return run(model, config, teacher=original, train_data=data, blend=blend, **more)

    whole, parted, resumed, third = (fresh() for _ in range(4))
    expected = trained(whole)
    with pytest.raises(Interruption):
        trained(parted, checkpoint_dir=tmp_path, on_event=interrupt_at_checkpoint)
    result = trained(resumed, checkpoint_dir=tmp_path, resume=True)
    assert (result.top1, result.loss) == (expected.top1, expected.loss)
    # A run that is over has the averages, and the statistics that were measured with them.
    trained(third, checkpoint_dir=tmp_path, resume=True)
    for tensor, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[tensor]), tensor
        assert torch.equal(value, third.state_dict()[tensor]), tensor
    after = evaluate_model(whole, images(12, 1), batch_size=8, device="cpu")
    assert after.top1 == expected.top1
    config = replace(config, ema=0.5)
    with raises(UserError, "state-of-other-run"):
        trained(fresh(), checkpoint_dir=tmp_path, resume=True)
