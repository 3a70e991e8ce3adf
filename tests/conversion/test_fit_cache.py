"""The identity of saved fits: it sees every image and every weight."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from tiedconv.calibration import CalibConfig
from tiedconv.conversion.fit_cache import identity_of
from tiedconv.data import ImageList, eval_transform, open_unlabelled
from tiedconv.planning.recipe import Recipe
from tiedconv.sources import Preprocess

COUNT = 40


def identity(data: object, model: nn.Module | None = None) -> dict[str, object]:
    torch.manual_seed(0)
    model = model or nn.Linear(30, 30)
    return identity_of(CalibConfig(), Recipe.of("tied"), model, data)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [0, 1, 17, COUNT - 1])
def test_every_image_in_memory_counts(index: int) -> None:
    images = torch.rand(COUNT, 3, 4, 4)
    before = identity(TensorDataset(images, torch.zeros(COUNT, dtype=torch.long)))
    images[index, 2, 3, 3] += 0.5
    after = identity(TensorDataset(images, torch.zeros(COUNT, dtype=torch.long)))
    assert {key for key in before if before[key] != after[key]} == {"images"}


def test_every_image_file_and_how_it_is_prepared_count(tmp_path: Path) -> None:
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:03d}.png")

    def found(size: int = 8) -> object:
        transform = eval_transform(Preprocess(size))
        return identity(ImageList(open_unlabelled(tmp_path, count=COUNT), transform))["images"]

    before = found()
    assert found() == before
    assert found(size=4) != before
    Image.new("RGB", (8, 8), (0, 9, 0)).save(tmp_path / "037.png")
    assert found() != before


def test_every_weight_counts() -> None:
    data = TensorDataset(torch.rand(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))
    model = nn.Linear(30, 30)
    before = identity(data, model)
    with torch.no_grad():
        model.weight[29, 29] += 1e-3
    assert identity(data, model)["weights"] != before["weights"]
