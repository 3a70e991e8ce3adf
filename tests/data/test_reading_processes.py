"""Scripts without a main guard, notebooks, data sets of `__main__`: read by one process."""

from __future__ import annotations

import logging
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import tiedconv
from tiedconv.data import Loader, loading
from tiedconv.data.reading_processes import why_not
from tiedconv.errors import DataError


class Colours(Dataset[tuple[Tensor, int]]):
    """Eight images of one colour each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 8, 8), index / 8), 0


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A `__main__` without a file, as a notebook's."""
    module = types.ModuleType("__main__")
    module.__spec__ = None
    monkeypatch.setitem(sys.modules, "__main__", module)
    return module


def test_a_script_with_a_guard_may_start_processes(main: types.ModuleType, tmp_path: Path) -> None:
    main.__file__ = str(tmp_path / "a.py")
    Path(main.__file__).write_text('if __name__ == "__main__":\n    pass\n')
    assert why_not(Colours()) is None


def test_a_script_without_a_guard_may_not(main: types.ModuleType, tmp_path: Path) -> None:
    main.__file__ = str(tmp_path / "a.py")
    Path(main.__file__).write_text("print(1)\n")
    assert "a.py" in str(why_not(Colours()))


def test_in_a_notebook_only_what_can_be_imported_is_sent(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert why_not(Colours()) is None
    monkeypatch.setattr(Colours, "__module__", "__main__")
    main.Colours = Colours  # type: ignore[attr-defined]
    assert why_not(Colours()) is not None


def test_what_cannot_be_sent_is_read_here(caplog: pytest.LogCaptureFixture) -> None:
    loading._say_once.cache_clear()
    data = Colours()
    data.transform = lambda image: image  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        batches = list(Loader(data, 4, workers=2).epoch())
    assert [len(batch.images) for batch in batches] == [4, 4]
    list(Loader(data, 4, workers=2).epoch())
    assert len(caplog.records) == 1


SCRIPT = """
import torch, tiedconv
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Noise(Dataset):
    def __len__(self):
        return 12
    def __getitem__(self, index):
        return torch.randn(16, generator=torch.Generator().manual_seed(index)), 0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    def forward(self, x):
        return self.layers(x)

calib = tiedconv.Calibration(
    DataLoader(Noise(), batch_size=4), config=tiedconv.CalibConfig(effort="fast"), workers=2
)
model = tiedconv.convert(Net(), "lowrank", rank=4, calib=calib)
print(type(model).__name__, tiedconv.report(model).stored)
"""


@pytest.mark.slow
@pytest.mark.parametrize("by", ["script", "stdin"])
def test_a_data_set_of_main_calibrates(by: str, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(SCRIPT)
    words = [str(script)] if by == "script" else ["-"]
    done = subprocess.run(
        [sys.executable, *words], input=SCRIPT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "Net"
    assert done.stderr.count("by this process alone") == 1, done.stderr


class Net(nn.Module):
    """Two matrices with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_tensor_or_a_list_of_images_calibrates_as_a_data_set_does() -> None:
    torch.manual_seed(0)
    net, images = Net(), torch.randn(24, 16)
    pairs = TensorDataset(images, torch.zeros(24))
    made = [
        tiedconv.convert(net, "lowrank", rank=4, calib=given, effort="fast")
        for given in (pairs, images, list(images), DataLoader(images, batch_size=5))
    ]
    for other in made[1:]:
        for name, tensor in made[0].state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


def test_what_is_no_image_is_refused() -> None:
    for odd in ([("a", 0)], [3.0], [(torch.ones(3),)], [{1: 2}]):
        with raises(DataError, "samples-malformed"):
            list(Loader(odd, 4, workers=0).epoch())
