"""The one writer of compact files: what it writes is checked, and `read` accepts it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from micro import all_micros
from torch import Tensor, nn

import tiedconv
from tiedconv.core.plan import Plan
from tiedconv.errors import PlanError
from tiedconv.io import json_text, safetensors_file, validation
from tiedconv.io.checkpoint import write_compact
from tiedconv.io.checkpoint_reader import Checkpoint, read
from tiedconv.io.safetensors_file import DTYPES, SafetensorsFile, forms_of, write_tensors
from tiedconv.runtime.tie import state_of

Write = Callable[..., int]


@functools.cache
def model() -> nn.Module:
    return tiedconv.convert(all_micros()["timm-vit"].model(), "lors")


def plan_of(**changes: Any) -> Plan:
    return dataclasses.replace(state_of(model()).plan, **changes)


def write(path: Path, plan: Plan, history: list[dict[str, Any]] | None = None) -> Checkpoint:
    """The streamed way: the tensors are asked for one by one."""
    tensors = model().state_dict()
    state = state_of(model())
    entries = list(state.history) if history is None else history
    return write_compact(path, plan, state.source, entries, tensors.__getitem__)


def aliases(count: int) -> dict[str, str]:
    return {f"a{i}": "head.bias" for i in range(count)}


def test_what_the_streamed_writer_writes_is_what_save_writes(tmp_path: Path) -> None:
    written = write(tmp_path / "a.safetensors", plan_of())
    assert written.size == (tmp_path / "a.safetensors").stat().st_size
    tiedconv.save(model(), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_file_at_the_limits_is_written_and_read(tmp_path: Path) -> None:
    plan = plan_of(aliases=aliases(validation.MAX_WEIGHTS))
    history = [{"step": "x"}] * validation.MAX_ENTRIES
    write(tmp_path / "m.safetensors", plan, history)
    found = read(tmp_path / "m.safetensors")
    assert found.plan == plan
    assert len(found.history) == validation.MAX_ENTRIES
    tensors = dict(found.tensors())
    assert all(torch.equal(tensors[n], model().state_dict()[n]) for n in tensors)


def refused(path: Path, *arguments: Any) -> str:
    """The code of the error; nothing is left of the file."""
    with pytest.raises(PlanError) as caught:
        write(path, *arguments)
    assert not list(path.parent.iterdir())
    return caught.value.code


def test_a_plan_beyond_the_limits_is_not_written(tmp_path: Path) -> None:
    large = plan_of(aliases=aliases(validation.MAX_WEIGHTS + 1))
    assert refused(tmp_path / "m.safetensors", large) == "plan-too-large"


def test_a_history_beyond_the_limits_is_not_written(tmp_path: Path) -> None:
    history = [{"step": "x"}] * (validation.MAX_ENTRIES + 1)
    assert refused(tmp_path / "m.safetensors", plan_of(), history) == "output-unreadable"


def test_a_header_beyond_the_limits_is_not_written(tmp_path: Path) -> None:
    history = [{"step": "x", "data": "x" * 90_000}] * 100
    assert refused(tmp_path / "m.safetensors", plan_of(), history) == "output-unreadable"


def test_values_beyond_the_limits_are_not_written(tmp_path: Path) -> None:
    history = [{"step": "x", "data": [0] * json_text.MAX_VALUES}]
    assert refused(tmp_path / "m.safetensors", plan_of(), history) == "output-unreadable"


def test_more_tensors_than_the_limit_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = len(plan_of().kept) + len(plan_of().factors)
    for most in (count + 1, count):  # the header counts its metadata as well
        limits = dataclasses.replace(safetensors_file.COMPACT, tensors=most)
        monkeypatch.setattr(safetensors_file.SafetensorsFile.__init__, "__defaults__", (limits,))
        write(tmp_path / "m.safetensors", plan_of())
        (tmp_path / "m.safetensors").unlink()
    limits = dataclasses.replace(safetensors_file.COMPACT, tensors=count - 1)
    monkeypatch.setattr(safetensors_file.SafetensorsFile.__init__, "__defaults__", (limits,))
    assert refused(tmp_path / "m.safetensors", plan_of()) == "output-unreadable"


# Every dtype.


def of_dtype(dtype: torch.dtype) -> Tensor:
    numbers = torch.arange(6).reshape(2, 3) % 2
    return numbers.to(dtype)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_written_and_read(name: str, tmp_path: Path) -> None:
    tensors = {"a": of_dtype(DTYPES[name]), "b": of_dtype(torch.float32)}
    path = tmp_path / "m.safetensors"
    write_tensors(path, forms_of(tensors), tensors.__getitem__, {})
    file = SafetensorsFile(path)
    assert file.dtypes == {"a": name, "b": "F32"}
    found = file.tensor("a")
    assert found.dtype == DTYPES[name]
    assert torch.equal(found.view(torch.uint8), tensors["a"].view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "size"),
    [("I8", 1), ("I16", 2), ("U16", 2), ("U64", 8), ("C64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1)],
)
def test_report_counts_the_bytes_of_every_dtype(name: str, size: int, tmp_path: Path) -> None:
    """A kept buffer of the dtype counts with its own item size."""
    plain = all_micros()["timm-vit"].model()
    plain.register_buffer("extra", of_dtype(DTYPES[name]))
    tied = tiedconv.convert(plain, "lors")
    path = tmp_path / "m.safetensors"
    tiedconv.save(tied, path)
    parameters = sum(p.numel() for p in tied.parameters())
    assert tiedconv.report(path).tensor_bytes == 4 * parameters + 6 * size
