"""What a conversion is judged by: images that no statistics are of, and outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from calibration_helpers import images_of
from hypothesis import given
from hypothesis import strategies as st
from micro import all_micros
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import tiedconv
from tiedconv.calibration import CalibConfig, output_divergence
from tiedconv.calibration.held_out import split
from tiedconv.calibration.output_divergence import OutputDivergence
from tiedconv.conversion import byte_search
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.ridged_metrics import RIDGES, RidgedMetrics
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.data import Broken, Loader, Subset, TensorList
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.runtime.tensors import state_tensors
from tiedconv.runtime.tie import state_of


def calib_on(name: str, count: int = 24) -> Calibration:
    images = images_of(name, count)[:count]
    data = TensorDataset(images, torch.zeros(count, dtype=torch.int64))
    return Calibration(data, config=CalibConfig(effort="fast"), workers=0, device="cpu")


@pytest.mark.parametrize("wanted", [{"params": "60%"}, {"bytes": "30%"}])
def test_statistics_are_of_no_image_that_is_held_out(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Any]
) -> None:
    seen: list[Tensor] = []
    measure = Calibration.measure

    def spied(self: Calibration, model: Any, weights: Any, data: Any, moved: Any = None) -> Any:
        seen.extend(data[i][0] for i in range(len(data)))
        return measure(self, model, weights, data, moved)

    monkeypatch.setattr(Calibration, "measure", spied)
    calib = calib_on("timm-vit")
    tiedconv.convert(all_micros()["timm-vit"].model(), "auto", calib=calib, **wanted)
    assert isinstance(calib.data, TensorDataset)
    train, held = split(24, calib.config.seed)
    for part, used in ((train, True), (held, False)):
        for image in calib.data.tensors[0][part]:
            assert any(torch.equal(image, other) for other in seen) is used


def test_outputs_are_compared_on_the_images_that_are_held_out_first() -> None:
    calib = calib_on("timm-vit")
    assert isinstance(calib.data, TensorDataset)
    cache = StatisticsCache(all_micros()["timm-vit"].model(), calib, calib.data)
    train, held = split(24, calib.config.seed)
    found = torch.stack([cache._others[i][0] for i in range(24)])
    assert torch.equal(found, calib.data.tensors[0][torch.cat([held, train])])
    assert len(cache.divergences(all_micros()["timm-vit"].model())) >= 8  # enough for chance


def test_without_images_outputs_are_compared_on_others_than_were_measured() -> None:
    micro = all_micros()["timm-vit"]
    model = micro.model()
    source = tiedconv.sources.Source("memory")
    cache = byte_search._cache(model, source, None, None)
    assert cache is not None
    measured, others = cache._data, cache._others
    assert len(measured) == len(others)  # type: ignore[arg-type]
    assert not torch.equal(measured[0][0], others[0][0])


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 10.0), st.integers(0, 2**16))
def test_a_ridge_adds_the_error_on_inputs_of_mean_energy(
    out: int, into: int, ridge: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, 9, generator=generator).double() for n in (out, into))
    error = torch.randn(out, into, generator=generator).double()
    metric = KfacMetric(a @ a.t() / 9, b @ b.t() / 9)
    assert metric.right is not None
    flat = KfacMetric(metric.left, float(metric.right.diagonal().mean()) * torch.eye(into).double())
    ridged = RidgedMetrics({"w": metric, "v": KfacMetric(metric.left)}, ridge)
    assert ridged["w"].cost(error) == pytest.approx(
        metric.cost(error) + ridge * flat.cost(error), rel=1e-9
    )
    assert ridged["v"].right is None
    assert list(ridged) == ["w", "v"]
    assert ridged.get("x") is None


@pytest.mark.parametrize("nearest", range(len(RIDGES) + 1))
def test_the_ridge_is_taken_whose_outputs_are_nearest(
    monkeypatch: pytest.MonkeyPatch, nearest: int
) -> None:
    tried: list[float] = []
    judged: list[Any] = []
    round_to_bytes = byte_search.round_to_bytes

    def spied(plan: Any, tensors: Any, metrics: Any, *rest: Any, **options: Any) -> Any:
        tried.append(getattr(metrics, "_ridge", 0.0))
        return round_to_bytes(plan, tensors, metrics, *rest, **options)

    def judge(original: Any, fitted: Any, rounded: Any, cache: Any) -> Tensor:
        judged.append(rounded)
        return torch.tensor([3.0, 2.0, 4.0]) + abs(len(judged) - 1 - nearest)

    monkeypatch.setattr(byte_search, "round_to_bytes", spied)
    monkeypatch.setattr(byte_search, "_divergences", judge)
    monkeypatch.setattr(byte_search, "COMPARED", 1)
    calib = calib_on("timm-vit", 8)
    tied = tiedconv.convert(all_micros()["timm-vit"].model(), "auto", bytes="30%", calib=calib)
    assert tried == [0.0, *RIDGES][: nearest + 2]
    found, wanted = state_tensors(tied), judged[nearest].tensors
    codes = [name for name in wanted if name.endswith("/codes")]
    assert codes
    assert all(torch.equal(found[name], wanted[name]) for name in codes)


@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_outputs_are_compared_with_the_originals(
    monkeypatch: pytest.MonkeyPatch, effort: str
) -> None:
    """Also once the model has been made a shared one, and fitted."""
    original = all_micros()["timm-vit"].model()
    calib = dataclasses.replace(calib_on("timm-vit", 8), config=CalibConfig(effort=effort))
    compare, compared = StatisticsCache.divergences, []

    def checked(self: StatisticsCache, model: Any) -> Tensor:
        found = compare(self, model)
        expected = OutputDivergence(original, self._others, batch_size=1, device="cpu", workers=0)
        assert torch.equal(found, expected.of(model))
        compared.append(found)
        return found

    monkeypatch.setattr(StatisticsCache, "divergences", checked)
    model = all_micros()["timm-vit"].model()
    tied = tiedconv.convert(model, "lowrank", params="60%", bytes="30%", calib=calib)
    assert state_of(tied).plan.groups
    assert len(compared) > 1


@pytest.mark.parametrize(("kept", "runs"), [(0, 9), (2000, 7), (1 << 20, 3)])
def test_outputs_of_the_original_are_kept_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, kept: int, runs: int
) -> None:
    """A batch of two images of 3 x 8 x 8 takes 1,536 bytes, and its outputs 80."""
    monkeypatch.setattr(output_divergence, "KEPT", kept)
    data = TensorDataset(torch.rand(6, 3, 8, 8), torch.zeros(6))
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(192, 10))
    outputs, count = OutputDivergence(model, data, batch_size=2, device="cpu", workers=0), 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    model.register_forward_hook(counted)
    others = [nn.Sequential(nn.Flatten(), nn.Linear(192, 10)) for _ in range(3)]
    for other in others:
        known = model(data.tensors[0].clone()).log_softmax(1)
        found = other(data.tensors[0]).log_softmax(1)
        each = (known.exp() * (known - found)).sum(1).double()
        assert torch.allclose(outputs.of(other), each.reshape(3, 2).mean(1), rtol=1e-4)
    assert count == runs + len(others)
    assert model.training


def test_images_that_can_not_be_read_are_left_out_of_every_comparison() -> None:
    class Some(Dataset[Any]):
        def __len__(self) -> int:
            return 5

        def __getitem__(self, index: int) -> Any:
            if index == 2:
                return Broken("2.png", "cut off")
            return torch.full((1, 2, 2), index / 5.0), 0

    model, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    outputs = OutputDivergence(model, Some(), batch_size=1, device="cpu", workers=0)
    first = outputs.of(other)
    assert len(first) == 4
    assert torch.equal(outputs.of(other), first)
    assert torch.equal(outputs.of(model), torch.zeros(4, dtype=torch.float64))


def test_a_subset_is_read_as_the_whole_is() -> None:
    pixels = torch.randint(0, 256, (10, 3, 4, 4), dtype=torch.uint8)
    whole = TensorList(pixels, torch.arange(10))
    part = Subset(whole, torch.tensor([7, 2, 5]))
    (batch,) = Loader(part, 8, workers=0).epoch()
    (every,) = Loader(whole, 16, workers=0).epoch()
    assert torch.equal(batch.images, every.images[[7, 2, 5]])
    assert batch.labels.tolist() == [7, 2, 5]
    assert part.groups is None


def test_a_subset_keeps_the_groups_of_its_samples() -> None:
    whole: Any = TensorDataset(torch.arange(6.0).reshape(6, 1))
    whole.groups = torch.tensor([0, 1, 0, 1, 2, 0]).numpy()
    assert Subset(whole, torch.tensor([0, 2])).groups is None  # all of one shape
    groups = Subset(whole, torch.tensor([3, 2, 1])).groups
    assert groups is not None
    assert groups.tolist() == [0, 1, 0]
