"""Models whose state dicts hold what few hold: objects, complex and lazy tensors, uneven heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from error_codes import raises
from torch import Tensor, nn

import tiedconv
from tiedconv.errors import NothingToConvert, UserError


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.turns = nn.ModuleList(nn.Linear(16, 16, dtype=torch.complex64) for _ in range(3))
        self.steps = 5

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        z = x.to(torch.complex64)
        for layer in self.turns:
            z = layer(z)
        return z.abs()


def test_extra_state_and_complex_weights_are_kept_as_they_are(tmp_path: Path) -> None:
    model, x = Stack().eval(), torch.randn(2, 16)
    tied = tiedconv.convert(model, "lors", rank=16)
    assert {g.name.split(".")[0] for g in tiedconv.plan(model, "lors").groups} == {"layers"}
    with torch.no_grad():
        assert torch.allclose(tied(x), model(x), atol=1e-4)
        tiedconv.save(tied, tmp_path / "m.safetensors")
        loaded = tiedconv.load(tmp_path / "m.safetensors", model=Stack())
        assert torch.equal(loaded(x), tied(x))


def test_lazy_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.LazyLinear(4))
    with raises(UserError, "lazy-parameters", "2.weight"):
        tiedconv.convert(model, "lors", rank=4)


def test_keys_and_values_of_other_widths_are_not_rotated_to_each_other() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layers = nn.ModuleList(
                nn.ModuleDict(
                    {"self_attn": nn.MultiheadAttention(24, 4, bias=False, kdim=10,
                                                        vdim=14, batch_first=True)}
                )
                for _ in range(3)
            )  # fmt: skip
            self.register_buffer("keys", torch.randn(2, 5, 10))
            self.register_buffer("values", torch.randn(2, 5, 14))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer["self_attn"](x, self.keys, self.values)[0]
            return x

    model, x = Cross().eval(), torch.randn(2, 7, 24)
    tied = tiedconv.convert(model, "tied", rank=24)
    with torch.no_grad():
        assert torch.allclose(tied(x), model(x), atol=1e-4)
    with raises(NothingToConvert, "nothing-to-convert"):
        tiedconv.convert(model, "tied", pairing="vo-qk")
