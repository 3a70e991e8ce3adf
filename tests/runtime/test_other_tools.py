"""What other tools do to a tied model works, or is refused with what to do; nothing is lost."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from micro import all_micros
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.weight_norm import weight_norm

import tiedconv
from tiedconv.errors import UserError
from tiedconv.runtime.computed_weight import ComputedWeight
from tiedconv.runtime.tie import dense_state_dict
from tiedconv.sources.torchvision_compat import import_torchvision

import_torchvision()
import timm  # noqa: E402

SCHEMES: dict[str, dict[str, Any]] = {"lors": {"rank": 2}, "tied": {}}


@pytest.fixture(params=["lors", pytest.param("tied", marks=pytest.mark.slow)])
def tied(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model = all_micros()["timm-vit"].model()
    return tiedconv.convert(model, request.param, **SCHEMES[request.param])


def linear_of(model: nn.Module) -> nn.Linear:
    """A layer whose weight is computed."""
    found = model.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(found, nn.Linear)
    return found


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


def set_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.zeros_like(layer.weight)


def set_rows(layer: nn.Linear) -> None:
    layer.weight[0] = 0


def add(layer: nn.Linear) -> None:
    layer.weight += 1  # type: ignore[assignment]


EDITS: dict[str, Callable[[nn.Linear], object]] = {
    "assign a parameter": lambda a: setattr(a, "weight", nn.Parameter(torch.zeros(2, 2))),
    "assign a tensor": lambda a: setattr(a, "weight", torch.zeros(2, 2)),
    "register": lambda a: a.register_parameter("weight", nn.Parameter(torch.zeros(2, 2))),
    "register it elsewhere": lambda a: a.register_parameter("other", a.weight),
    "mul_": lambda a: a.weight.mul_(2),
    "mul_ of data": lambda a: a.weight.data.mul_(2),
    "mul_ of detached": lambda a: a.weight.detach().mul_(2),
    "copy_ to a view": lambda a: a.weight.t().copy_(torch.zeros_like(a.weight.t())),
    "zero_ of a row": lambda a: a.weight[1].zero_(),
    "set data": set_data,
    "set rows": set_rows,
    "augmented": add,
    "out": lambda a: torch.add(a.bias, 1, out=a.weight),
    "init": lambda a: nn.init.zeros_(a.weight),
    "normal init": lambda a: nn.init.trunc_normal_(a.weight),
    "reset": lambda a: a.reset_parameters(),
    "freeze by hand": lambda a: a.weight.requires_grad_(False),
    "prune": lambda a: prune.l1_unstructured(a, "weight", 0.5),
    "parametrize": lambda a: parametrize.register_parametrization(a, "weight", Half()),
    "weight norm": lambda a: parametrizations.weight_norm(a),
    "orthogonal": lambda a: parametrizations.orthogonal(a),
    "weight norm by hooks": lambda a: weight_norm(a),
    "script": lambda a: torch.jit.script(a),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.filterwarnings("ignore")
def test_an_edit_of_a_computed_weight_is_refused_and_changes_nothing(
    tied: nn.Module, edit: str
) -> None:
    layer, x = linear_of(tied), all_micros()["timm-vit"].input()
    before, names = tied(x), list(tied.state_dict())
    with torch.no_grad(), raises(UserError, "weight-is-computed", "untie"):
        EDITS[edit](layer)
    assert torch.equal(tied(x), before)
    assert list(tied.state_dict()) == names
    plain = tiedconv.untie(tied)
    if edit not in ("assign a tensor", "register", "augmented", "out"):
        with torch.no_grad():
            EDITS[edit](linear_of(plain))


@pytest.mark.filterwarnings("ignore")
def test_quantize_dynamic_is_refused_rather_than_leaving_layers_as_they_are(
    tied: nn.Module,
) -> None:
    with raises(UserError, "weight-is-computed", "untie"):
        torch.ao.quantization.quantize_dynamic(tied, {nn.Linear}, torch.qint8)
    dense = torch.ao.quantization.quantize_dynamic(tiedconv.untie(tied), {nn.Linear}, torch.qint8)
    assert "quantized" in type(dense.get_submodule("blocks.0.mlp.fc1")).__module__


def test_reading_gives_the_weight_and_what_is_made_of_it_can_be_changed(tied: nn.Module) -> None:
    layer = linear_of(tied)
    dense = dense_state_dict(tied)["blocks.0.mlp.fc1.weight"]
    weight = layer.weight
    assert isinstance(weight, ComputedWeight)
    assert torch.equal(weight, dense)
    assert weight.shape == dense.shape
    for made in (weight * 2, weight.clone(), weight.detach().clone(), weight @ weight.t()):
        assert type(made) is Tensor
        made.zero_()
    other = torch.ones_like(weight)
    with torch.no_grad():
        other.copy_(weight)
        nn.Linear(*layer.weight.shape[::-1]).weight.copy_(weight)
    assert torch.equal(other, dense)
    assert torch.equal(pickle.loads(pickle.dumps(weight.detach().clone())), dense)
    assert torch.equal(weight.norm().detach(), dense.norm())
    x = torch.rand(2, dense.shape[1])
    assert torch.equal(nn.functional.linear(x, weight), nn.functional.linear(x, dense))


def test_a_gradient_flows_through_a_weight_that_was_read(tied: nn.Module) -> None:
    tied.train()
    linear_of(tied).weight.square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in tied.parameters())


class Lora(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def wrap(model: Any) -> None:
    model.blocks[0].mlp.fc1 = Lora(model.blocks[0].mlp.fc1)


def new_head(model: Any) -> None:
    model.reset_classifier(9)


def more(model: Any) -> None:
    model.extra = nn.Linear(2, 2)


def fewer(model: Any) -> None:
    del model.norm


@pytest.mark.parametrize("change", [wrap, new_head, more, fewer])
def test_a_changed_model_works_on_and_is_not_saved_as_if_it_were_the_converted_one(
    tied: nn.Module, tmp_path: Path, change: Callable[[nn.Module], None]
) -> None:
    x = all_micros()["timm-vit"].input()
    before = tied(x)
    change(tied)
    if change is wrap:
        assert torch.allclose(tied(x), before)
    with raises(UserError, "model-changed", "untie"):
        tiedconv.save(tied, tmp_path / "o.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strict", [True, False])
def test_a_dense_state_dict_is_refused(tied: nn.Module, strict: bool) -> None:
    dense, own = dense_state_dict(tied), copy.deepcopy(tied.state_dict())
    with raises(UserError, "state-dict-is-dense"):
        tied.load_state_dict(dense, strict=strict)
    tied.load_state_dict(own)
    assert all(torch.equal(a, own[n]) for n, a in tied.state_dict().items())
    tiedconv.untie(tied).load_state_dict(dense)


def test_copies_and_pickles_refuse_it_too(tied: nn.Module) -> None:
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied))):
        with raises(UserError, "state-dict-is-dense"):
            other.load_state_dict(dense_state_dict(tied))
        with raises(UserError, "weight-is-computed"):
            nn.init.zeros_(linear_of(other).weight)
        tiedconv.untie(other).load_state_dict(dense_state_dict(tied))


class Saver(nn.Module):
    """A model whose library saves a state dict and knows no ties, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.state_dict(), folder / "model.pt")


def test_a_saver_that_knows_no_ties_is_refused_until_the_model_is_untied(tmp_path: Path) -> None:
    model: Any = tiedconv.convert(Saver(), "lowrank", rank=4)
    with raises(UserError, "model-is-tied", "untie"):
        model.save_pretrained(tmp_path / "a")
    with raises(UserError, "model-is-tied"):
        copy.deepcopy(model).save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    dense: Any = tiedconv.untie(model)
    dense.save_pretrained(tmp_path / "b")
    again = Saver()
    again.load_state_dict(torch.load(tmp_path / "b" / "model.pt", weights_only=True))
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in dense.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("timm-vit", "torchvision-resnet") else pytest.param(n, marks=pytest.mark.slow)
        for n in all_micros()
    ],
)
def test_untie_gives_the_order_of_parameters_and_the_versions_of_modules_back(name: str) -> None:
    model = all_micros()[name].model()
    names = [n for n, _ in model.named_parameters()]
    states = list(model.state_dict())
    versions = model.state_dict()._metadata  # type: ignore[attr-defined]
    for scheme in ("tied", "lors", "lowrank"):
        try:
            tied = tiedconv.convert(model, scheme)
        except tiedconv.TiedconvError:
            continue
        assert dense_state_dict(tied)._metadata.keys() == versions.keys()  # type: ignore[attr-defined]
        dense = tiedconv.untie(tied)
        assert [n for n, _ in dense.named_parameters()] == names
        assert list(dense.state_dict()) == states
        assert dense.state_dict()._metadata == versions  # type: ignore[attr-defined]


def test_reparameterised_by_timm() -> None:
    model = timm.create_model("repvgg_a0", num_classes=3).eval()
    tied = tiedconv.convert(model, "lowrank", rank=4)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = tied(x)
        fused = timm.utils.reparameterize_model(tiedconv.untie(copy.deepcopy(tied)))
        assert torch.allclose(fused(x), before, rtol=1e-3, atol=1e-3)
        direct = timm.utils.reparameterize_model(tied)
        assert torch.allclose(direct(x), before, rtol=1e-3, atol=1e-3)
