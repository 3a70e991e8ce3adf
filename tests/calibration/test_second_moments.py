"""Sums of second moments against plain products in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiedconv.calibration import second_moments
from tiedconv.calibration.second_moments import SecondMoment


def exact(rows: Tensor) -> Tensor:
    return rows.double().t() @ rows.double()


@pytest.mark.parametrize("strip", [1, 3, 7, 8, 256])
def test_a_mean_is_that_of_the_outer_products(strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "STRIP", strip)
    first, second, more = torch.randn(5, 8), torch.randn(6, 8), torch.randn(2, 8)
    moment = SecondMoment()
    for rows, half in ((first, 0), (second, 1), (more, 0)):
        moment.add(rows, half)
    assert moment.rows == [7, 6]
    expected = exact(first) + exact(more), exact(second)
    for half, total in enumerate(expected):
        assert torch.allclose(moment.mean(half, 3), total / 3, rtol=1e-5, atol=1e-5)
        assert torch.equal(moment.mean(half, 3), moment.mean(half, 3).mT)


@pytest.mark.parametrize("start", [0, 2, 5])
def test_rows_of_some_columns_are_added_where_these_are(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_moments, "STRIP", 3)
    rows = torch.randn(4, 4)
    moment = SecondMoment()
    moment.add(rows, 0, start=start, width=9, scale=2.5)
    expected = torch.zeros(9, 9).double()
    expected[start : start + 4, start : start + 4] = 2.5 * exact(rows)
    assert torch.allclose(moment.mean(0, 1), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(moment.mean(1, 1), moment.mean(1, 1).mT)
    assert float(moment.mean(1, 1).abs().max()) < 1e-5


@pytest.mark.parametrize("width", [1, 8, 9, 40])
def test_bytes_are_those_of_the_tensors_held(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "STRIP", 8)
    moment = SecondMoment()
    moment.add(torch.randn(2, width), 0)
    held = [*moment._whole, *moment._first]
    assert SecondMoment.nbytes(width) == sum(t.untyped_storage().nbytes() for t in held)
    assert width < 40 or SecondMoment.nbytes(width) <= 0.61 * 12 * width**2
