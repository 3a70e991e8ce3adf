"""What a history measured, as sentences."""

from __future__ import annotations

import pytest

from tiedconv.commands.measured import measured


def of_calibration(mean: object) -> list[str]:
    figures = {"compares": "cosine of the features", "counts": False, "mean": mean, "images": 9}
    return [each.text for each in measured([{"calibration": {"agreement": figures}}])]


def test_a_cosine_above_one_by_round_off_counts() -> None:
    assert of_calibration(1.0000001) == ["1.0000"]
    assert of_calibration(-1.0000001) == ["-1.0000"]


@pytest.mark.parametrize("mean", [1.01, float("nan"), True, "1", None])
def test_what_is_no_fraction_is_left_out(mean: object) -> None:
    assert of_calibration(mean) == []
