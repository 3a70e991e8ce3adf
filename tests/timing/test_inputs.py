"""Models are timed on inputs that they really take: token ids, images and text, videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn
from towers import bert, clip, pairs

import tiedconv
from tiedconv.commands import latency
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.workload import Counted, counted
from tiedconv.core.workload import Workload
from tiedconv.errors import BudgetError, MissingExtra
from tiedconv.runtime.tie import state_of
from tiedconv.timing import choose_runtime, measure_times
from tiedconv.timing import table as tables
from tiedconv.timing.inputs import batch_of, tensors_of
from tiedconv.timing.sites import sites_of

TOKENS = 10  # of a sample of `pairs`


def llama() -> nn.Module:
    """Two layers, two heads of queries for each of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Video(nn.Module):
    """Clips `(n, 3, frames, H, W)`, the same layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(3, 16, 4, 4)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, clips: Tensor) -> Any:
        x = self.patches(clips).flatten(2).mT.contiguous()
        return self.head(self.mix(self.mix(x).relu()).mean(1))


def seen(model: nn.Module, **given: Any) -> Counted:
    found = counted(model, **given)
    assert found is not None
    return found


def shapes(model: nn.Module, found: Counted, count: int) -> dict[str, list[tuple[int, ...]]]:
    """What each weight is applied to, of so many inputs at a time."""
    sites = sites_of(model, found.arguments, found.workload, count)
    return {name: [site.shape for site in each] for (name, _), each in sites.items()}


def test_samples_of_text_are_timed_at_their_length() -> None:
    model = bert()
    samples = [{k: v for k, v in s.items() if k != "pixel_values"} for s in pairs(2)]
    found = shapes(model, seen(model, calib=Calibration(samples, 2)), 3)
    assert found["encoder.layer.0.attention.self.query.weight"] == [(3, TOKENS, 32)]
    assert found["encoder.layer.1.output.dense.weight"] == [(3, TOKENS, 64)]
    longest = shapes(model, seen(model), 1)  # without samples, as an export is traced
    assert longest["encoder.layer.0.attention.self.query.weight"] == [(1, 20, 32)]


def test_each_tower_is_timed_on_its_own_input() -> None:
    model = clip()
    for found, tokens in (
        (seen(model, calib=Calibration(pairs(2), 2)), TOKENS),
        (seen(model, example=torch.zeros(1, 3, 32, 32)), 20),
    ):
        of = shapes(model, found, 2)
        assert of["text_model.encoder.layers.0.mlp.fc1.weight"] == [(2, tokens, 32)]
        assert of["vision_model.encoder.layers.0.mlp.fc1.weight"] == [(2, 17, 32)]


def test_a_video_and_a_layer_that_runs_twice() -> None:
    model, x = Video().eval(), torch.zeros(2, 3, 8, 8, 8)
    found = shapes(model, seen(model, example=x), 4)
    assert found["mix.weight"] == [(4, 8, 16)] * 2
    assert found["head.weight"] == [(4, 1, 16)]


def test_a_batch_repeats_what_has_a_row_for_each_input() -> None:
    arguments = (torch.ones(2, 3),), {"mask": torch.zeros(5), "n": 7, "ids": torch.arange(2)}
    (x,), kwargs = batch_of(arguments, 4)
    assert x.shape == (4, 3)
    assert kwargs["mask"].shape == (5,)
    assert kwargs["ids"].tolist() == [0] * 4
    assert kwargs["n"] == 7
    (empty,) = tensors_of(batch_of(((torch.zeros(1, 2, device="meta"),), {}), 1))
    assert empty.device.type == "cpu"


FURTHER = [
    pytest.param(build, name, marks=pytest.mark.slow)
    for build, name in ((bert, "openvino"), (clip, "onnx"), (llama, "onnx"))
]


@pytest.mark.parametrize(
    ("build", "name"),
    [(bert, "torch"), (clip, "torch"), (llama, "torch"), (bert, "onnx"), *FURTHER],
)
def test_a_runtime_runs_the_model(name: str, build: Any, tmp_path: Path) -> None:
    try:
        runtime = choose_runtime(name)
    except MissingExtra:
        pytest.skip(f"{name} is not installed")
    model, example = build(), torch.zeros(1, 3, 32, 32) if build is clip else None
    batch = batch_of(seen(model, example=example).arguments, 2)
    runtime.model(model, batch, tmp_path, 1)()


def test_a_budget_of_time_of_a_language_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tables, "ROUNDS", 1)
    measured = []

    def fixed(runs: Any, *_: Any) -> list[float]:
        measured.append(len(runs))
        return [1e-3, *(1e-5 * i for i in range(1, len(runs)))]

    monkeypatch.setattr(tables, "in_turn", fixed)
    monkeypatch.setattr(tables, "seconds", lambda *_: 0.1)
    monkeypatch.setattr(tables, "saved_together", lambda *_: None)
    monkeypatch.setattr(latency, "time_of_plan", lambda *_: None)
    model = tiedconv.convert(llama(), "lowrank", latency="0.9x", on="torch")
    record = state_of(model).history[0]["latency"]
    assert record["predicted_ns"] <= 0.9 * record["original_ns"]
    assert measured


class OneAtATime(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(1, 8))


def test_a_model_that_takes_one_input_at_a_time_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with raises(BudgetError, "latency-unknown"):
        measure_times(OneAtATime(8, 8), Workload(64, {}, ((1, 8),)), "torch", 2)
