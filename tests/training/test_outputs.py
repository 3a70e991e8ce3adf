"""What a model answers: only class logits are treated so, and NaN has no accuracy."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn
from torch.utils.data import Dataset

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.conversion.calibrate import Calibration
from tiedconv.data import Loader, TensorList
from tiedconv.errors import RunError, UserError
from tiedconv.training import evaluate_model
from tiedconv.training.losses import class_logits_of


class Mapper(nn.Module):
    """Convolutions whose output is a map of the image's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_maps_of_pixels_are_no_classes(channels: int, effort: str) -> None:
    data = TensorList(torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
    calib = Calibration(data, images=8, config=CalibConfig(effort=effort), workers=0)
    with raises(UserError, "not-class-logits", f", {channels}, 8, 8)"):
        tiedconv.convert(Mapper(channels), "lowrank", rank=1, calib=calib)
    tiedconv.convert(Mapper(channels), "lowrank", rank=1)


def test_what_counts_as_class_logits() -> None:
    rows = torch.rand(2, 5)
    assert class_logits_of(rows) is rows or torch.equal(class_logits_of(rows), rows)
    tokens = {"logits": torch.rand(2, 7, 5)}
    assert class_logits_of(tokens).shape == (2, 7, 5)
    for other in (torch.rand(2, 7, 5), torch.rand(5), {"logits": torch.rand(2, 5, 8, 8)}):
        with raises(UserError, "not-class-logits"):
            class_logits_of(other)


class Nan(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((3,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3), keepdim=False)[:, None] * 0 + self.bias


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_answers_nan_has_no_accuracy(value: float) -> None:
    data = TensorList(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))
    with raises(RunError, "outputs-not-finite"):
        evaluate_model(Nan(value), data, workers=0)
    assert evaluate_model(Nan(1.0), data, workers=0).images == 4


class Killed(Dataset[Any]):
    """Its reader is killed, as by a machine without memory."""

    in_memory = False

    def __init__(self, parent: int) -> None:
        self.parent = parent

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(3, 8, 8), 0


@pytest.mark.slow
def test_a_killed_reader_is_one_line(tmp_path: Path) -> None:
    loader = Loader(Killed(os.getpid()), 4, workers=1)
    with raises(RunError, "worker-lost", "--workers"):
        list(loader.epoch())
    loader.close()
