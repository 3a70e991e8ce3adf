"""What a model answers: NaN has no accuracy."""

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

from tiedconv.data import Loader, TensorList
from tiedconv.errors import RunError
from tiedconv.training import evaluate_model


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
    with raises(RunError, "worker-lost", "workers"):
        list(loader.epoch())
    loader.close()
