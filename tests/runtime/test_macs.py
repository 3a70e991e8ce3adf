"""Multiply-adds are those that PyTorch's own counter counts, before a conversion and after it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from covering import slow_unless
from micro import MEANT_FOR, Micro, all_micros, every_micro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tiedconv
from tiedconv.core.expr import MatMul, Mul, Ref, Reshape, transpose
from tiedconv.core.workload import Piece, Workload
from tiedconv.errors import NothingToConvert, SchemeError
from tiedconv.runtime.factored_linear import apply_factors
from tiedconv.runtime.flops import apply_macs, fewest_macs
from tiedconv.runtime.macs import measure, unfused, work_of
from tiedconv.runtime.narrow_layers import narrow_layers
from tiedconv.runtime.tie import state_of
from tiedconv.schemes import all_schemes

FAST = ("timm-vit", "torchvision-resnet", "aliased", "generators")


class Called(nn.Module):
    """A tiny model, called as its library calls it."""

    def __init__(self, micro: Micro, model: nn.Module) -> None:
        super().__init__()
        self.model, self._micro = model, micro

    def forward(self, x: Tensor) -> Tensor:
        return self._micro.forward(self.model, x)


def counted(micro: Micro, model: nn.Module) -> int:
    """By PyTorch, of one example."""
    model.requires_grad_(False)  # its counter tracks gradients of views, which fails without any
    with torch.no_grad(), FlopCounterMode(display=False) as counter, unfused():
        micro.forward(model, micro.input()[:1])
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


@functools.cache
def workload_of(name: str) -> Workload:
    micro = every_micro()[name]
    found = measure(Called(micro, micro.model()), (micro.input()[:1],), {})
    prefix = len("model.")
    uses = {weight[prefix:]: use for weight, use in found.uses.items()}
    return Workload(found.total, uses, found.inputs)


@pytest.mark.parametrize("name", slow_unless(every_micro(), FAST))
def test_a_model_takes_what_pytorch_counts(name: str) -> None:
    micro = every_micro()[name]
    model = micro.model()
    before = {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    work = measure(Called(micro, model), (micro.input()[:1],), {})
    assert work.total == counted(micro, model) > 0
    assert {n: (id(p), p.data_ptr()) for n, p in model.named_parameters()} == before
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert sum(use.work for use in work.uses.values()) <= work.total
    columns = {n: p.numel() // p.shape[0] for n, p in Called(micro, model).named_parameters()}
    for n, use in work.uses.items():
        assert sum(p.rows * (p.stop - p.start) * columns[n] for p in use.pieces) <= use.work


PAIRS = [
    *itertools.product(all_micros(), [s for s in all_schemes() if s not in MEANT_FOR]),
    *((of, scheme) for scheme, (of, _) in MEANT_FOR.items()),
]
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "lowrank": [{"rank": 2}, {"rank": 2, "fused": False}, {"rank": 0.9}],
    "basis": [{"base_rank": 4}, {"base_rank": 4, "tie": True}, {"groups": "all"}],
    "tied": [{}, {"base_rank": 3}, {"base_rank": 3, "rank": 1}],
    "lors": [{}, {"base_rank": 3, "rank": 1}, {"bases": 2, "rank": 0.1, "groups": "adjacent:3"}],
    "shared": [{}],
    "auto": [{"params": "70%"}],
    **{scheme: [options] for scheme, (_, options) in MEANT_FOR.items()},
}


FAST_PAIRS = [pair for pair in PAIRS if pair[0] in ("timm-vit", "aliased") and pair[1] != "auto"]
FAST_PAIRS.append(("hybrid", "narrow"))  # depthwise kernels


LOSE_HEADS = ("timm-vit", "timm-vit-qknorm", "timm-deit", "hf-vit", "hf-deit", "hf-imagegpt")
"""Of classes in `head_products.LOSES_HEADS`: counted with narrow layers. Others keep their products
of attention, and narrow convolutions take fewer multiply-adds than `apply_factors` can."""


@pytest.mark.parametrize(("name", "scheme"), slow_unless(PAIRS, FAST_PAIRS))
def test_a_converted_model_takes_what_pytorch_counts(name: str, scheme: str) -> None:
    micro, work = all_micros()[name], workload_of(name)
    for options in OPTIONS.get(scheme, [{}]):
        try:
            model = tiedconv.convert(micro.model(), scheme, **options)
        except (NothingToConvert, SchemeError):  # no group, or more bases than layers
            continue
        expected = micro.logits(model)
        plan = state_of(model).plan
        if name in LOSE_HEADS:
            narrow_layers(model)
        apply_factors(model, cache=True)
        assert work_of(plan.weights, work) == counted(micro, model)
        # A generator is never materialised, even where its weight would take fewer.
        assert scheme in MEANT_FOR or work_of(plan.weights, work) <= work.total
        assert torch.allclose(micro.logits(model), expected, rtol=1e-3, atol=1e-4)


def test_the_form_that_takes_fewest_is_run() -> None:
    base, b, a = Ref("base", (8, 8)), Ref("b", (8, 2)), Ref("a", (2, 8))
    assert fewest_macs(MatMul(b, a)) == (32, True)
    assert fewest_macs(base) == (64, False)
    assert fewest_macs(transpose(base)) == (64, False)
    assert fewest_macs(MatMul(Ref("b", (8, 4)), Ref("a", (4, 8)))) == (64, False)
    # Scales are no multiply-adds, but patches of an image are not in memory to be scaled.
    scaled = Mul(MatMul(b, Ref("a", (2, 72))), Ref("t", (1, 72)))
    assert apply_macs(scaled) == 2 * 72 + 8 * 2
    assert apply_macs(Reshape(scaled, (8, 8, 3, 3))) is None
    assert fewest_macs(Reshape(scaled, (8, 8, 3, 3))) == (8 * 72, False)


class Twice(nn.Module):
    """Runs one layer twice, another never, a third where values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.never, self.some = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """`(n, 8)` to the same."""
        x = self.again(self.again(x))
        return self.some(x) if float(x.sum()) < 1e9 else x


def test_a_layer_counts_as_often_as_it_runs() -> None:
    model = Twice()
    work = measure(model, (torch.zeros(3, 8),), {})
    assert work.total == 3 * 3 * 64
    assert work.uses["again.weight"].pieces == (Piece(0, 8, 6, calls=2),)
    assert "never.weight" not in work.uses
    assert not any(p.is_meta for p in model.parameters())
