"""A network and images that a few seconds can learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiedconv.data import Broken, TensorList
from tiedconv.training import TrainConfig, TrainResult, train

QUICK = TrainConfig(epochs=3, batch_size=16, lr=1e-2, weight_decay=0.0, seed=5)


class TiedNet(nn.Module):
    """A small CNN with batch norm and dropout, whose last weight is computed.

    As in our tied models, a stored tensor lives on the root under a path-like name.
    """

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.register_parameter("tied/head/base", nn.Parameter(torch.randn(8, classes) * 0.3))

    @property
    def weight(self) -> Tensor:
        return self._parameters["tied/head/base"].T  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().amax(dim=(2, 3))
        return F.linear(self.drop(x), self.weight)


def make_net(seed: int = 0, classes: int = 3) -> TiedNet:
    torch.manual_seed(seed)
    return TiedNet(classes)


def make_data(count: int = 96, seed: int = 0, augment: str = "none") -> TensorList:
    """Bars that lie, stand or run aslant, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 1, 8, 8, generator=generator) * 0.4
    for at, label in enumerate(labels.tolist()):
        where = int(torch.randint(1, 7, (), generator=generator))
        if label == 0:
            images[at, 0, where] += 1
        elif label == 1:
            images[at, 0, :, where] += 1
        else:
            images[at, 0] += torch.eye(8)
    return TensorList(images, labels, augment=augment)


class Flawed(torch.utils.data.Dataset[Any]):
    """Data of which some images can't be read."""

    def __init__(self, data: TensorList, broken: set[int]) -> None:
        self.data, self.broken = data, broken

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return Broken(f"{index}.png", "cut off") if index in self.broken else self.data[index]


def run(model: nn.Module, config: TrainConfig = QUICK, **options: Any) -> TrainResult:
    options = {"train_data": make_data(), "val_data": make_data(48, 1), "device": "cpu"} | options
    return train(model, config=config, **options)


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
