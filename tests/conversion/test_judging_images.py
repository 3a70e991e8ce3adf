"""What a conversion is judged by: images that no statistics are of, and outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_helpers import images_of
from hypothesis import given
from hypothesis import strategies as st
from micro import all_micros
from torch import Tensor
from torch.utils.data import TensorDataset

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.calibration.held_out import split
from tiedconv.conversion import byte_search
from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.ridged_metrics import RIDGES, RidgedMetrics
from tiedconv.conversion.statistics_cache import StatisticsCache
from tiedconv.data import Loader, Subset, TensorList
from tiedconv.numerics.kfac_metric import KfacMetric
from tiedconv.runtime.tensors import state_tensors


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
