"""The state of an interrupted run: read as it was written, to the bit, or refused."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from safetensors.torch import save_file
from torch import nn

from tiedconv.errors import CheckpointError, UserError
from tiedconv.io.run_dir import RunDir
from tiedconv.io.run_state import read_state, require_same, weights_digest, write_state

STATE: dict[str, Any] = {
    "model": {"a.weight": torch.randn(3, 4), "flag": torch.tensor([True, False])},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "groups": [{"betas": (0.9, 1)}],
    },
    "loss": 0.1 + 0.2,
    "best": -math.inf,
    "large": 2**100,
    "none": None,
    "texts": ["tensor", "", "ä\n"],
    "nested": [["tensor", "0"], {"tensor": True}],
    "half": torch.randn(2).bfloat16(),
    "empty": torch.zeros(0, 2),
}


def same(a: Any, b: Any) -> bool:
    """Equal in types and bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_state(tmp_path / "s.safetensors", "training", STATE)
    return tmp_path / "s.safetensors"


def test_a_state_is_read_as_it_was_written(path: Path) -> None:
    assert same(read_state(path, "training"), STATE)


def test_not_a_number_is_kept(tmp_path: Path) -> None:
    write_state(tmp_path / "s", "x", {"loss": math.nan})
    assert math.isnan(read_state(tmp_path / "s", "x")["loss"])


def test_views_are_stored_by_their_values(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "again": base, "turned": base.t(), "row": base[1]}
    write_state(tmp_path / "s", "x", state)
    assert same(read_state(tmp_path / "s", "x"), state)


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 4, 1, 1), (1, 4, 2, 2), (8, 4, 3, 3, 3)])
def test_memory_layouts_are_kept(shape: tuple[int, ...], tmp_path: Path) -> None:
    # A convolution sums in the order of memory: resumed in another, it ends with other bits.
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    value = torch.empty(shape, memory_format=layout).copy_(torch.randn(shape))
    write_state(tmp_path / "s.safetensors", "training", {"a": value, "b": value.contiguous()})
    found = read_state(tmp_path / "s.safetensors", "training")
    assert found["a"].stride() == value.stride()
    assert torch.equal(found["a"], value)
    assert found["b"].is_contiguous()


def test_nothing_but_plain_data_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_state(tmp_path / "s", "x", {"layer": nn.Linear(2, 2)})
    assert not list(tmp_path.iterdir())


def refused(path: Path, kind: str = "training") -> None:
    with pytest.raises(CheckpointError) as caught:
        read_state(path, kind)
    assert caught.value.code == "state-damaged"
    assert str(path) in str(caught.value)


def test_damaged_and_foreign_files_are_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    for at in (9, len(data) // 3, len(data) - 1):  # in the header, the metadata and a tensor
        changed = bytearray(data)
        changed[at] ^= 1
        path.write_bytes(changed)
        refused(path)
    for length in (0, 8, 100, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data)
    refused(path, "calibration")
    refused(tmp_path / "missing")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    refused(tmp_path / "other")


def test_a_pickle_is_refused_unread(path: Path) -> None:
    class Exploit:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, ("raise SystemExit('code was run')",)

    path.write_bytes(pickle.dumps(Exploit()))
    refused(path)


def test_another_run_is_named() -> None:
    require_same(Path("s"), {"lr": 1}, {"lr": 1})
    with raises(UserError, "state-of-other-run", "lr 1 -> 2") as caught:
        require_same(Path("s"), {"lr": 1}, {"lr": 2})
    assert caught.value.code == "state-of-other-run"


def test_states_of_an_older_version_are_refused(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.require_readable()
    (tmp_path / "step-000000012.pt").write_bytes(b"\x80")
    with raises(UserError, "state-of-older-version") as caught:
        folder.require_readable()
    assert caught.value.code == "state-of-older-version"
    with pytest.raises(UserError) as caught:
        folder.require_new()
    assert caught.value.code == "run-interrupted"
    folder.clear()
    assert not tmp_path.exists()


@pytest.mark.parametrize("index", [0, 63, 64, 5_000, 9_999])
def test_the_digest_of_weights_sees_every_value(index: int) -> None:
    model = nn.Linear(100, 100)
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.weight.view(-1)[index] += 1e-3
    assert weights_digest(model) != before


def test_the_digest_of_weights_sees_names_and_dtypes() -> None:
    digests = {
        weights_digest(nn.Linear(2, 2).requires_grad_(False).double()),
        weights_digest(nn.Sequential(nn.Linear(2, 2))),
        weights_digest(None),
    }
    assert len(digests) == 3
