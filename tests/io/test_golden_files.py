"""Compact files that the code at commit 19df801 wrote (golden/): they load to the same bits.

`golden.json` holds what that code found in them: SHA-256 of each stored tensor, and of each weight
that is computed from them its SHA-256, norm and projection on cos(0), cos(1), ...; and the outputs
on `torch.randn(input_shape)` of seed 7. All models had random weights:

- tied: `timm:resnet26`, `--scheme tied`;
- lors-calibrated: `timm:vit_tiny_patch16_224`, `--scheme lors --params 60%`, calibrated on 24
  random images at normal effort;
- lors-adaptive: `golden_models:generators` of tests/helpers, `--scheme lors-adaptive`;
- digits-vit: `tiedconv.demo:digits_vit`, the name that the demo's function had then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiedconv
from tiedconv.core.expr import MatMul
from tiedconv.io.checkpoint_reader import read, tensor_hash
from tiedconv.runtime.tie import dense_state_dict

GOLDEN = Path(__file__).parent / "golden"
RECORDS: dict[str, dict[str, Any]] = json.loads((GOLDEN / "golden.json").read_text("utf-8"))

# Computed weights and outputs are sums of products, rounded differently by each processor.
ROUNDING = 1e-6


def path_of(name: str) -> Path:
    return GOLDEN / f"{name}.safetensors"


def load(name: str) -> Any:
    return tiedconv.load(path_of(name), trust_code=name == "lors-adaptive")


def projection(tensor: Tensor) -> float:
    values = tensor.double().flatten()
    return (values * torch.cos(torch.arange(len(values), dtype=torch.float64))).sum().item()


def test_every_golden_file_has_a_record() -> None:
    assert {p.stem for p in GOLDEN.glob("*.safetensors")} == set(RECORDS)
    assert len(RECORDS) == 4


@pytest.mark.parametrize("name", RECORDS)
def test_stored_tensors_are_the_same_bits(name: str) -> None:
    stored = dict(read(path_of(name)).tensors())
    assert {n: tensor_hash(t) for n, t in stored.items()} == RECORDS[name]["stored"]
    state = load(name).state_dict()
    for key, tensor in stored.items():
        assert torch.equal(state[key], tensor)
        assert state[key].dtype == tensor.dtype


@pytest.mark.parametrize("name", RECORDS)
def test_computed_weights_are_the_same(name: str) -> None:
    """To the bit where nothing is multiplied, else to the rounding of the processor."""
    expected = RECORDS[name]["materialised"]
    plan, dense = read(path_of(name)).plan, dense_state_dict(load(name))
    assert expected.keys() == plan.weights.keys()
    for key, expr in plan.weights.items():
        if not any(isinstance(node, MatMul) for node in expr.walk()):
            assert tensor_hash(dense[key]) == expected[key]["sha256"]
        norm = dense[key].double().norm().item()
        bound = ROUNDING * expected[key]["norm"]
        assert abs(norm - expected[key]["norm"]) <= bound
        assert abs(projection(dense[key]) - expected[key]["projection"]) <= bound


def test_tied_weights_are_the_same_bits() -> None:
    """The test above compares hashes in at least this file."""
    dense = dense_state_dict(load("tied"))
    for key, record in RECORDS["tied"]["materialised"].items():
        assert tensor_hash(dense[key]) == record["sha256"]


@pytest.mark.parametrize("name", RECORDS)
def test_outputs_are_the_same(name: str) -> None:
    record = RECORDS[name]
    x = torch.randn(record["input_shape"], generator=torch.Generator().manual_seed(7))
    expected = torch.tensor(record["outputs"])
    with torch.no_grad():
        found = load(name)(x)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("name", RECORDS)
def test_report_counts_what_is_stored(name: str) -> None:
    file = read(path_of(name))
    found = tiedconv.report(path_of(name))
    assert found.stored == file.plan.stored
    assert found.file_bytes == path_of(name).stat().st_size


@pytest.mark.parametrize("name", RECORDS)
def test_saved_again_they_hold_the_same_tensors(name: str, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    tiedconv.save(load(name), again)
    before, after = read(path_of(name)), read(again)
    assert after.hashes == before.hashes
    assert after.plan == before.plan
    assert after.source == before.source
    assert after.history == before.history
