"""Statistics that are gathered below all modules, against hooks on modules and autograd."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from calibration_helpers import MICROS, Images, images_of
from error_codes import raises
from micro import settle
from planning_helpers import weights_of
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, pad, scaled_dot_product_attention
from torch.nn.grad import conv2d_weight

from tiedconv.calibration import (
    KfacStatistics,
    gather_statistics,
    kfac_statistics,
    second_moments,
)
from tiedconv.calibration.second_moments import SecondMoment
from tiedconv.commands.sensitivity import matrices_of
from tiedconv.core.plan import Member
from tiedconv.data import TensorList
from tiedconv.errors import DataError, TiedconvError
from tiedconv.families.inspect import inspect_model
from tiedconv.numerics.kfac_metric import KfacMetric, shrinkage_estimate
from tiedconv.planning.rank_allocation import metrics_of
from tiedconv.planning.recipe import Recipe

QUANTILE = 0.37  # of a class in the cumulated probabilities, where classes are not drawn


def gather(
    model: nn.Module, weights: Mapping[str, bool], x: Tensor, **options: Any
) -> KfacStatistics:
    return gather_statistics(model, weights, Images(x), **{"device": "cpu", **options})


def certain(shares: Tensor, count: int, *, generator: torch.Generator) -> Tensor:
    """In place of drawing: a class that an image's own probabilities decide."""
    assert count == 1
    assert isinstance(generator, torch.Generator)
    return (shares.cumsum(-1) < QUANTILE).sum(-1, keepdim=True).clamp(max=shares.shape[-1] - 1)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics as they are summed: no ridge, no class drawn by chance, no place left out."""
    monkeypatch.setattr(
        kfac_statistics, "shrinkage_estimate", lambda a, b, least: (((a + b) / 2).float(), 0.0)
    )
    monkeypatch.setattr(torch, "multinomial", certain)
    monkeypatch.setattr(kfac_statistics, "POSITIONS", 10**6)


def rows_read(module: nn.Module, x: Tensor) -> Tensor:
    """What the matrix of a module is multiplied with, `(images, places, in)`."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1])
    (top, left), (kh, kw), (sh, sw) = module.padding, module.kernel_size, module.stride
    x = pad(x, (int(left), int(left), int(top), int(top)))
    patches = x.unfold(2, kh, sh).unfold(3, kw, sw)  # (n, in, h, w, kh, kw)
    n, channels, h, w = patches.shape[:4]
    each = patches.reshape(n, module.groups, channels // module.groups, h * w, kh, kw)
    return each.permute(0, 3, 1, 2, 4, 5).reshape(n, h * w * module.groups, -1)


def rows_written(module: nn.Module, y: Tensor) -> Tensor:
    """The outputs of a module, `(images, places, out)`."""
    if isinstance(module, nn.Conv2d):
        return y.flatten(2).mT
    return y.reshape(len(y), -1, y.shape[-1])


def by_hooks(model: nn.Module, modules: list[str], x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """C and G of the modules' weights, from what the modules read and write."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}
    hooks = []
    for name in modules:

        def keep(_: nn.Module, given: tuple[Tensor, ...], made: Tensor, name: str = name) -> None:
            made.retain_grad()
            seen[name].append((given[0].detach(), made))

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    out = model(x.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    logits = getattr(out, "logits", out)
    shares = logits.detach().softmax(-1).double()
    drawn = certain(shares, 1, generator=torch.Generator())
    (-log_softmax(logits, -1).gather(-1, drawn).sum()).backward()
    found = {}
    for name, uses in seen.items():
        module = model.get_submodule(name)
        reads = torch.cat([rows_read(module, x).flatten(0, 1) for x, _ in uses]).double()
        pulls = [y.grad for _, y in uses]
        writes = torch.cat([rows_written(module, g).flatten(0, 1) for g in pulls if g is not None])
        g = writes.double().t() @ writes.double() / len(x)
        c = reads.t() @ reads / len(reads)
        if isinstance(module, nn.Conv2d):
            energy = sum(energy_of(module, x, y.grad) for x, y in uses if y.grad is not None)
            g *= energy / len(x) / float(g.trace() * c.trace())
        found[name] = c, g
    return found


def energy_of(module: nn.Conv2d, x: Tensor, pulls: Tensor) -> float:
    """The squared norms of the weight's gradients of all images."""
    how = module.stride, module.padding, module.dilation, module.groups
    grads = [
        conv2d_weight(a[None], module.weight.shape, g[None], *how)
        for a, g in zip(x, pulls, strict=True)
    ]
    return sum(float(g.double().square().sum()) for g in grads)


def assert_close(metric: KfacMetric, right: Tensor, left: Tensor) -> None:
    assert metric.left is not None
    assert metric.right is not None
    for mine, other in ((metric.right, right), (metric.left, left)):
        assert mine.shape == other.shape
        # Another order of the same sums moves a ReLU over its edge here and there: on processors
        # without vector instructions that is 4e-5 of the largest entry.
        assert torch.allclose(mine.double(), other, rtol=1e-3, atol=3e-4 * float(other.max()))


# Convolutions with a stride, padding, groups, of one pixel; linear layers; fused qkv; HF's.
@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "name",
    ["timm-vit", "timm-vit-qknorm", "torchvision-resnet", "torchvision-resnext", "timm-resnet",
     "hf-vit", "hf-resnet", "convmixer", "perceptron"],
)  # fmt: skip
def test_moments_are_those_of_what_modules_read_and_of_gradients_of_what_they_write(
    name: str,
) -> None:
    model, x = MICROS[name].model(), images_of(name, 6)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    assert len(weights) >= 3
    found = gather(model, weights, x, batch_size=3)
    assert found.metrics.keys() == found.ridges.keys() == weights.keys()
    expected = by_hooks(model, [n.removesuffix(".weight") for n in weights], x)
    for module, (right, left) in expected.items():
        assert_close(found.metrics[f"{module}.weight"], right, left)


class Explicit(nn.Module):
    """The self-attention of `nn.MultiheadAttention`, made of modules."""

    def __init__(self, from_: nn.MultiheadAttention) -> None:
        super().__init__()
        d, self.heads = from_.embed_dim, from_.num_heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.qkv.weight, self.qkv.bias = from_.in_proj_weight, from_.in_proj_bias
        self.out.load_state_dict(from_.out_proj.state_dict())

    def forward(self, x: Tensor, *_: Tensor, **__: Any) -> tuple[Tensor, None]:
        """`(n, tokens, d)` to the same."""
        n, tokens, d = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, tokens, d)), None


def explicit(model: nn.Module) -> nn.Module:
    """A torchvision ViT whose attentions are made of modules."""
    model = copy.deepcopy(model)
    for layer in model.get_submodule("encoder.layers"):
        layer.self_attention = Explicit(layer.self_attention)
    return model


LAYERS = [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(3)]
INSIDE = {"in_proj_weight": "qkv", "out_proj.weight": "out"}


@pytest.mark.usefixtures("bare")
def test_projections_inside_of_multihead_attention_are_seen() -> None:
    model, x = MICROS["torchvision-vit"].model(), images_of("torchvision-vit", 8)
    weights = {f"{layer}.{weight}": False for layer in LAYERS for weight in INSIDE}
    assert weights.items() <= weights_of(inspect_model(model), Recipe.of("lowrank")).items()
    found = gather(model, weights, x)
    modules = [f"{layer}.{module}" for layer in LAYERS for module in INSIDE.values()]
    expected = by_hooks(explicit(model), modules, x)
    for layer in LAYERS:
        for weight, module in INSIDE.items():
            assert_close(found.metrics[f"{layer}.{weight}"], *expected[f"{layer}.{module}"])


def test_halves_are_of_images_where_tokens_come_first() -> None:
    """Else both halves would show the same images, and nearly no ridge would be chosen."""
    model, x = MICROS["torchvision-vit"].model(), images_of("torchvision-vit", 12)
    inside = gather(model, {f"{a}.{w}": False for a in LAYERS for w in INSIDE}, x)
    names = {f"{a}.{m}.weight": False for a in LAYERS for m in INSIDE.values()}
    outside = gather(explicit(model), names, x)
    for layer in LAYERS:
        for weight, module in INSIDE.items():
            mine, other = f"{layer}.{weight}", f"{layer}.{module}.weight"
            assert inside.ridges[mine] == pytest.approx(outside.ridges[other], rel=1e-3, abs=1e-6)


class Transposed(nn.Module):
    """Transformers' Conv1D, whose weight is stored as `(in, out)`."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.up, self.down, self.head = Conv1D(12, 6), Conv1D(6, 12), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, tokens, 6)` to `(n, 4)`."""
        return self.head((x + self.down(torch.tanh(self.up(x)))).mean(1))


@pytest.mark.usefixtures("bare")
def test_weights_stored_as_in_out_have_their_moments_as_out_in() -> None:
    model, x = settle(Transposed()), torch.randn(6, 5, 6)
    found = gather(model, {"up.weight": True, "down.weight": True}, x)
    for module, (right, left) in by_hooks(model, ["up", "down"], x).items():
        assert_close(found.metrics[f"{module}.weight"], right, left)
    assert found.metrics["up.weight"].right is not None
    assert found.metrics["up.weight"].right.shape == (6, 6)


class Rows(nn.Module):
    """A matrix of which some rows only are ever used, and those in two parts."""

    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.w = nn.Parameter(torch.randn(6, 9) if transposed else torch.randn(9, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 6)` to `(n, 4)`."""
        if self.transposed:
            parts = x @ self.w[:, 1:4], (2 * x) @ self.w[:, 5:8]
        else:
            parts = linear(x, self.w[1:4]), linear(2 * x, self.w[5:8])
        return self.head(torch.cat([torch.tanh(part) for part in parts], -1))


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_that_are_used_apart_have_their_own_places(transposed: bool) -> None:
    model, x = Rows(transposed=transposed), torch.randn(6, 6)
    metric = gather(model, {"w": transposed}, x).metrics["w"]
    # Of the two inputs x and 2 x, the moment is the mean.
    right = (x.t() @ x * 5 / 12).double()
    outputs = [
        (x @ (model.w[:, 1:4] if transposed else model.w[1:4].t())).detach().requires_grad_(),
        (2 * x @ (model.w[:, 5:8] if transposed else model.w[5:8].t())).detach().requires_grad_(),
    ]
    logits = model.head(torch.cat([torch.tanh(y) for y in outputs], -1))
    drawn = certain(logits.detach().softmax(-1).double(), 1, generator=torch.Generator())
    pulls = torch.autograd.grad(-log_softmax(logits, -1).gather(-1, drawn).sum(), outputs)
    left = torch.zeros(9, 9).double()
    for start, pull in zip((1, 5), pulls, strict=True):
        left[start : start + 3, start : start + 3] = (pull.t() @ pull / 6).double()
    assert_close(metric, right, left)


class Twice(nn.Module):
    """One linear layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 6)` to `(n, 4)`."""
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


@pytest.mark.usefixtures("bare")
def test_both_uses_of_a_weight_count() -> None:
    model, x = settle(Twice()), torch.randn(6, 6)
    found = gather(model, {"layer.weight": False}, x)
    assert_close(found.metrics["layer.weight"], *by_hooks(model, ["layer"], x)["layer"])


def test_some_places_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image with more than 64 places, some are taken and count for the others."""
    model, x = MICROS["torchvision-resnet"].model(), images_of("torchvision-resnet", 8)
    x = nn.functional.interpolate(x, scale_factor=2)  # 16 x 16 places in the first stage
    weights = {"layer1.1.conv1.weight": False, "layer1.1.conv2.weight": False}
    monkeypatch.setattr(
        kfac_statistics, "shrinkage_estimate", lambda a, b, least: (((a + b) / 2).float(), 0.0)
    )
    some = gather(model, weights, x)
    monkeypatch.setattr(kfac_statistics, "POSITIONS", 10**6)
    every = gather(model, weights, x)
    for name in weights:
        pairs = [(getattr(m.metrics[name], s)) for s in ("left", "right") for m in (some, every)]
        for mine, exact in (pairs[:2], pairs[2:]):
            assert not torch.equal(mine, exact)
            assert float(mine.trace()) == pytest.approx(float(exact.trace()), rel=0.25)


def test_classes_are_drawn_as_often_as_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over draws is the Fisher matrix of the exact probabilities."""
    monkeypatch.setattr(
        kfac_statistics, "shrinkage_estimate", lambda a, b, least: (((a + b) / 2).float(), 0.0)
    )
    torch.manual_seed(3)
    model, x = nn.Linear(3, 4), torch.randn(1, 3)
    moment = torch.zeros(4, 4)
    for seed in range(150):
        left = gather(model, {"weight": False}, x.expand(8, -1), seed=seed).metrics["weight"].left
        assert left is not None
        moment += left / 150
    p = model(x)[0].softmax(0).detach()
    assert torch.allclose(moment, torch.diag(p) - torch.outer(p, p), atol=0.03)


@functools.cache
def measured(name: str) -> tuple[KfacStatistics, Tensor]:
    """Statistics of a micro model on many images, and the images."""
    model, x = MICROS[name].model(), images_of(name, 128)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    return gather(model, weights, x, batch_size=64), x


@pytest.mark.parametrize(
    ("name", "factor", "mean"),
    [
        ("timm-vit", 2.0, 1.5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("torchvision-resnext", 5.0, 1.5),
                ("torchvision-vit", 2.5, 1.5),
                ("perceptron", 2.0, 1.5),
                ("hf-resnet", 3.5, 1.5),
                ("torchvision-resnet", 3.5, 1.5),
                ("timm-resnet", 3.5, 1.5),
            )
        ),
    ],
)
def test_the_cost_of_a_small_error_is_the_divergence_that_it_makes(
    name: str, factor: float, mean: float
) -> None:
    """In nats for each image: to a factor for each weight, and closer in the mean over them."""
    found, x = measured(name)
    model = MICROS[name].model(torch.float64)
    ratios = []
    with torch.no_grad():
        before = log_softmax(MICROS[name].forward(model, x.double()), -1)
        for weight, metric in found.metrics.items():
            parameter = model.get_parameter(weight)
            matrix = parameter.reshape(len(parameter), -1)
            error = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(5)).double()
            error *= 0.02 * matrix.norm() / error.norm()
            kept = parameter.clone()
            parameter += error.reshape(parameter.shape)
            after = log_softmax(MICROS[name].forward(model, x.double()), -1)
            parameter.copy_(kept)
            divergence = float((before.exp() * (before - after)).sum(-1).mean())
            assert divergence > 1e-9
            ratios.append(metric.cost(error) / divergence)
    assert len(ratios) == len(found.metrics)
    assert min(ratios) > 1 / factor
    assert max(ratios) < factor
    assert 1 / mean < float(torch.tensor(ratios).log().mean().exp()) < mean


@pytest.mark.parametrize("name", ["timm-vit", "torchvision-resnet", "torch-encoder"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = MICROS[name].model().train()
    parameters = dict(model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 2 == 0)
    next(iter(model.children())).eval()
    modes = [m.training for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    gather(model, weights_of(inspect_model(model), Recipe.of("lowrank")), images_of(name, 4))
    assert [m.training for m in model.modules()] == modes
    assert all(model.get_parameter(n) is p for n, p in parameters.items())
    assert [p.requires_grad for p in parameters.values()] == [
        i % 2 == 0 for i in range(len(parameters))
    ]
    assert all(p.grad is None for p in parameters.values())
    assert all(p.is_contiguous() for p in parameters.values())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_dropout_and_batch_statistics_are_those_of_evaluation() -> None:
    model, x = MICROS["torch-encoder"].model(), images_of("torch-encoder", 4)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    resting, training = gather(model, weights, x), gather(model.train(), weights, x)
    assert same(resting, training)


def same(one: KfacStatistics, other: KfacStatistics) -> bool:
    """Whether two measurements are the same to the bit."""
    assert one.metrics.keys() == other.metrics.keys()
    sides = [(m.left, m.right) for m in one.metrics.values()]
    others = [(m.left, m.right) for m in other.metrics.values()]
    return all(
        a is not None and b is not None and torch.equal(a, b)
        for pair, also in zip(sides, others, strict=True)
        for a, b in zip(pair, also, strict=True)
    ) and dict(one.ridges) == dict(other.ridges)


def test_a_seed_decides_all_and_nothing_else_does() -> None:
    model, x = MICROS["timm-vit"].model(), images_of("timm-vit", 8)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    first = gather(model, weights, x, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert same(first, gather(model, weights, x, seed=1))
    assert not same(first, gather(model, weights, x, seed=2))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(99)))
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    gather(model, weights, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weight_that_takes_no_part_is_as_cheap_as_the_cheapest() -> None:
    """A decoder's queries don't depend on the image, nor does its first self-attention."""
    model, x = MICROS["torch-transformer"].model(), images_of("torch-transformer", 4)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    found = gather(model, weights, x)
    left_out = {n for n in weights if n.startswith("transformer.decoder.layers.0.self_attn")}
    assert left_out
    assert weights.keys() - found.metrics.keys() == left_out
    least = min(m.weight for m in found.metrics.values())
    for slot in (p.slot for p in matrices_of(inspect_model(model)) if p.slot.tensor in left_out):
        metric = metrics_of([Member(slot)], found.metrics)[0]
        assert metric.cost(torch.ones(slot.matrix_shape)) == pytest.approx(
            least / 2 * slot.rows * slot.columns, rel=1e-4
        )
        assert not metrics_of([Member(slot)], {})[0].measured
    assert all(bool(torch.isfinite(r).all()) for m in found.metrics.values() for r in sides(m))


def sides(metric: KfacMetric) -> list[Tensor]:
    assert metric.left is not None
    assert metric.right is not None
    return [metric.left, metric.right]


def test_of_a_side_that_is_too_wide_the_trace_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity stands for it; errors along random directions cost as much on average."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.GELU(), nn.Linear(6, 5)).eval()
    data = TensorList(torch.randn(64, 3, 4, 4), [0] * 64)

    def measured() -> KfacMetric:
        return gather_statistics(model, {"1.weight": False}, data, workers=0).metrics["1.weight"]

    whole = measured()
    monkeypatch.setattr(second_moments, "LARGEST", 40)
    wide = measured()
    assert wide.right is None
    assert wide.left is not None
    assert whole.left is not None
    assert whole.right is not None
    errors = [torch.randn(6, 48, dtype=torch.float64) for _ in range(200)]
    one, other = (sum(m.cost(e) for e in errors) for m in (whole, wide))
    assert one == pytest.approx(other, rel=0.1)
    assert SecondMoment.nbytes(48) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_few_images_give_metrics_that_can_be_inverted(count: int) -> None:
    model, x = MICROS["timm-vit"].model(), images_of("timm-vit", count)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    seen: list[tuple[int, int]] = []
    found = gather(model, weights, x, batch_size=2, on_images=lambda *done: seen.append(done))
    assert found.images == count
    assert found.skipped == 0
    assert seen[-1] == (count, count)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    for metric in found.metrics.values():
        for side in sides(metric):
            assert float(torch.linalg.eigvalsh(side.double())[0]) > 0
    # Two halves are needed to tell chance from structure: of one image alone nothing is known.
    least = all(r == 1e-4 for pair in found.ridges.values() for r in pair)
    assert least == (count == 1)


def test_the_ridge_is_that_of_two_halves() -> None:
    """With two images, each is a half."""
    model, x = nn.Linear(5, 4), torch.randn(2, 5)
    found = gather(model, {"weight": False}, x)
    expected, ridge = shrinkage_estimate(*(torch.outer(row, row).double() for row in x))
    assert found.ridges["weight"][0] == pytest.approx(ridge)
    assert found.metrics["weight"].right is not None
    assert torch.allclose(found.metrics["weight"].right, expected)


def test_broken_images_are_skipped_and_reported() -> None:
    model, x = MICROS["timm-vit"].model(), images_of("timm-vit", 6)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    found = gather_statistics(model, weights, Images(x, (0, 3)), device="cpu", batch_size=1)
    assert (found.images, found.skipped) == (4, 2)
    assert found.metrics.keys() == weights.keys()


def test_data_without_a_readable_image_is_refused_and_the_model_stays() -> None:
    model, x = MICROS["timm-vit"].model(), images_of("timm-vit", 3)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    with raises(DataError, "no-readable-image"):
        gather_statistics(model, weights, Images(x, (0, 1, 2)), device="cpu")
    with raises(DataError, "no-images"):
        gather_statistics(model, weights, Images(x[:0]), device="cpu")
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_logits_is_refused_and_stays() -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> str:
            return str(self.layer(x))

    model = Nothing().train()
    with raises(TiedconvError, "no-tensors-returned"):
        gather(model, {"layer.weight": False}, torch.randn(2, 5))
    assert model.training
    assert model.layer.weight.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm-vit", "torchvision-resnet", "hf-vit"])
def test_several_passes_measure_what_one_does(name: str) -> None:
    """What the sums of all weights don't fit into takes more passes, not more memory."""
    model, x = MICROS[name].model(), images_of(name, 6)
    weights = weights_of(inspect_model(model), Recipe.of("lowrank"))
    shapes = {n: p.shape for n, p in model.named_parameters() if n in weights}
    outs = {n: shapes[n][transposed] for n, transposed in weights.items()}
    nbytes = SecondMoment.nbytes
    sizes = [nbytes(out) + nbytes(shapes[n].numel() // out) for n, out in outs.items()]
    whole = gather(model, weights, x, batch_size=2)
    for memory in (1, max(sizes), sum(sizes) - 1):
        seen: list[tuple[int, int]] = []
        found = gather(
            model, weights, x, batch_size=2, memory=memory,
            on_images=lambda *done, seen=seen: seen.append(done),
        )  # fmt: skip
        passes = seen[-1][1] // 6
        assert passes == len(sizes) if memory == 1 else 1 < passes < len(sizes)
        assert seen == [(done, 6 * passes) for done in range(2, 6 * passes + 1, 2)]
        assert found.ridges == whole.ridges
        assert (found.images, found.skipped) == (6, 0)
        for weight, metric in whole.metrics.items():
            assert torch.equal(metric.right, found.metrics[weight].right)
            assert torch.equal(metric.left, found.metrics[weight].left)
