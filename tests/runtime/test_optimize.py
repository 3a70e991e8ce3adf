"""`optimize` changes how a model runs, and nothing that it answers."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from covering import covering, slow_unless
from error_codes import raises
from micro import all_micros, schemes
from torch import Tensor, nn

import tiedconv
from tiedconv.errors import NothingToConvert, SchemeError, UserError
from tiedconv.runtime import optimize as module
from tiedconv.runtime.optimize import optimize
from tiedconv.runtime.shared_products import SHARED, SharedProduct
from tiedconv.runtime.tie import is_frozen, tied_weights
from tiedconv.runtime.tied_module import Forward, forward_of

PAIRS = list(itertools.product(all_micros(), schemes()))
FAST = covering([p for p in PAIRS if p[1] in ("lowrank", "basis", "narrow")], 0, 3)


@pytest.mark.parametrize("purpose", module.KINDS)
@pytest.mark.parametrize(("name", "scheme"), slow_unless(PAIRS, FAST))
def test_outputs_stay(name: str, scheme: str, purpose: str) -> None:
    micro = all_micros()[name]
    try:
        model = tiedconv.convert(micro.model(), scheme, params="70%")
    except (NothingToConvert, SchemeError, UserError):
        return
    before = micro.logits(model)
    assert optimize(model, purpose, example=micro.input()[:2]) is model
    scale = float(before.abs().max())
    assert float((micro.logits(model) - before).abs().max()) <= 1e-5 * scale
    plain = tiedconv.untie(model)
    assert float((micro.logits(plain) - before).abs().max()) <= 1e-5 * scale


MICRO = all_micros()["hf-vit"]


def basis() -> nn.Module:
    """Query, key and value are layers of their own, and of one basis."""
    return tiedconv.convert(MICRO.model(), "basis", base_rank=4)


def thin(monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
    """Fixed times: of the cached weight, with factors, and of the first product."""
    fixed = (seconds["cached"], seconds["factored"], seconds["first"])

    def found(runs: Any, **_: Any) -> list[float]:
        for run in runs:
            run()
        return list(fixed[: len(runs)])

    monkeypatch.setattr(module, "in_turn", found)


def forms(model: nn.Module) -> set[Forward | None]:
    return {forward_of(m, a) for _, m, a, _ in tied_weights(model)}


def test_the_faster_form_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = MICRO.input()[:2]
    thin(monkeypatch, cached=1.0, factored=0.5, first=0.1)
    model = optimize(tiedconv.convert(MICRO.model(), "lowrank", rank=4), example=x)
    assert forms(model) == {Forward.FACTORED_INFERENCE}
    assert not any(is_frozen(m, a) for _, m, a, _ in tied_weights(model))
    thin(monkeypatch, cached=1.0, factored=0.99, first=0.1)
    optimize(model, example=x)
    assert forms(model) == {Forward.MATERIALIZED}
    assert all(is_frozen(m, a) for _, m, a, _ in tied_weights(model))


def sharing(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if SHARED in m.__dict__]


def test_layers_of_one_input_multiply_by_their_basis_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = basis()
    before = MICRO.logits(model)
    # Each alone would be slower with factors; together they save two of three first products.
    thin(monkeypatch, cached=1.0, factored=1.1, first=0.6)
    optimize(model, example=MICRO.input())
    layers = range(3)
    assert sharing(model) == [
        f"vit.layers.{i}.attention.{name}"
        for i in layers
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    assert len({id(m.__dict__[SHARED]) for m in model.modules() if SHARED in m.__dict__}) == 3
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(MICRO.logits(model), before, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.allclose(MICRO.logits(other), before, atol=1e-5)
    tiedconv.untie(model)
    assert not sharing(model)


def test_a_shared_product_is_of_the_same_unchanged_features() -> None:
    shared, made = SharedProduct(), list[Tensor]()

    def of(x: Tensor) -> Tensor:
        def compute() -> Tensor:
            made.append(x.clone())
            return x + 1

        return shared.of(x, compute)

    x = torch.zeros(3)
    assert torch.equal(of(x), of(x))
    assert len(made) == 1
    x += 1
    assert torch.equal(of(x), torch.full((3,), 2.0))
    y = torch.ones(3)
    assert torch.equal(of(y), torch.full((3,), 2.0))
    assert len(made) == 3
    del y
    assert shared._last is None  # nothing is kept alive


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compilers_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = basis(), MICRO.input()
    thin(monkeypatch, cached=1.0, factored=1.1, first=0.6)
    optimize(model, example=x)
    before = MICRO.logits(model)
    with torch.no_grad():
        assert torch.allclose(torch.compile(model)(x).logits, before, atol=1e-5)
        exported = torch.export.export(model, (x,)).module()
        assert torch.allclose(exported(x).logits, before, atol=1e-5)


def test_what_would_change_is_cached_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    thin(monkeypatch, cached=1.0, factored=0.1, first=0.1)
    monkeypatch.setattr(module, "_same", lambda *_: False)
    with pytest.warns(UserWarning, match="cached"):
        model = optimize(basis(), example=MICRO.input())
    assert forms(model) == {Forward.MATERIALIZED}


def test_a_plain_model_or_a_wrong_input_is_refused() -> None:
    model = basis()
    with raises(UserError, "example-rejected"):
        optimize(model, example=torch.zeros(1, 3))
    with raises(UserError, "unknown-purpose"):
        optimize(model, "speed")
    with raises(UserError, "not-tied"):
        optimize(MICRO.model())
    assert not any(is_frozen(m, a) for _, m, a, _ in tied_weights(model))
