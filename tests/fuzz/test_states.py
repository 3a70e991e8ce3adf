"""Damaged states, shard indices of weights and kept indices of tar shards are refused or read anew.

Each is hashed, so damage of any kind is refused in our words, or changes nothing that is used.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import write_shards
from mutations import (
    Random,
    cut_short,
    flip_a_bit,
    flip_a_bit_of_the_header,
    insert_or_remove_bytes,
    join_two_halves,
    overwrite_a_run,
)
from safetensors.torch import save_file
from torch import Tensor

from tiedconv.data import open_images
from tiedconv.errors import CheckpointError, WeightsError
from tiedconv.io.run_state import read_state, write_state
from tiedconv.sources.weights import read_weights

Damage = Callable[[Random, bytes], bytes]
DAMAGES: tuple[Damage, ...] = (
    flip_a_bit,
    overwrite_a_run,
    cut_short,
    insert_or_remove_bytes,
    join_two_halves,
)
OF_HEADERS = (*DAMAGES, flip_a_bit_of_the_header)
QUICK, LONG = 200, 20_000


def damaged(good: bytes, seed: int, kinds: Sequence[Damage] = DAMAGES) -> bytes:
    return kinds[seed % len(kinds)](random.Random(seed), good)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


STATE = {
    "identity": {"lr": 0.1, "images": "abc", "processes": "1"},
    "model": {f"w{i}": torch.arange(40.0).reshape(5, 8) + i for i in range(6)},
    "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(5, 8)}}, "groups": [{"lr": 1e-3}]},
    "history": [(0.5, None, True), (float("inf"), 2**70, "x")],
}


@pytest.mark.parametrize("kind", ["training", "calibration"])
@pytest.mark.parametrize("count", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_damaged_state_is_refused_or_unchanged(tmp_path: Path, kind: str, count: int) -> None:
    path = tmp_path / "state.safetensors"
    write_state(path, kind, STATE)
    good = path.read_bytes()
    assert equal(read_state(path, kind), STATE)
    codes: list[str] = []
    for seed in range(count):
        path.write_bytes(damaged(good, seed, OF_HEADERS))
        try:
            found = read_state(path, kind)
        except CheckpointError as error:
            codes.append(error.code)
        else:
            assert equal(found, STATE), seed
    assert set(codes) == {"state-damaged"}
    assert len(codes) > 0.9 * count


@pytest.mark.parametrize("count", [QUICK, pytest.param(LONG, marks=pytest.mark.slow)])
def test_a_damaged_index_of_weights_is_refused_or_gives_the_same(
    tmp_path: Path, count: int
) -> None:
    tensors = {f"layer.{i}.weight": torch.full((3, 3), float(i)) for i in range(4)}
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "a.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    places = {n: "a.safetensors" if n in names[:2] else "b.safetensors" for n in names}
    good = json.dumps({"metadata": {"total_size": 144}, "weight_map": places}).encode()
    for seed in range(count):
        index.write_bytes(damaged(good, seed))
        try:
            found = read_weights(index).tensors
        except WeightsError:
            continue
        # Without a tensor in the list it is not read, and the model then lacks it by name.
        assert all(n in tensors and torch.equal(t, tensors[n]) for n, t in found.items()), seed


@pytest.mark.parametrize("count", [60, pytest.param(3_000, marks=pytest.mark.slow)])
def test_a_damaged_index_of_tar_shards_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pictures = [(f"{i:03d}", i % 2, bytes([i]) * 50) for i in range(6)]
    spec = write_shards(tmp_path / "shards", {"val": pictures})
    expected = contents(spec)
    (cached,) = (tmp_path / "cache").rglob("*.npy")
    good = cached.read_bytes()
    for seed in range(count):
        cached.write_bytes(damaged(good, seed))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert contents(spec) == expected, seed


def contents(spec: object) -> list[tuple[bytes, int]]:
    images = open_images(str(spec))
    return [(images._bytes(i), images.label(i)) for i in range(len(images))]
