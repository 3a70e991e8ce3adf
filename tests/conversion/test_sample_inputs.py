"""Samples that are more than one image: dicts, text beside images, chosen outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from error_codes import raises
from torch import Tensor, nn
from towers import TOKENS, bert, clip, pairs

import tiedconv
from tiedconv.calibration import CalibConfig
from tiedconv.commands.compare import compare
from tiedconv.commands.sensitivity import sensitivity
from tiedconv.conversion.calibrate import Calibration, DrawnText, Event
from tiedconv.errors import DataError, UserError
from tiedconv.runtime.call_hooks import random_text, same_random_numbers
from tiedconv.runtime.tie import state_of

QUICK = CalibConfig(steps=6, joint_steps=6, batch_size=8)


def calibration(data: Any, **options: Any) -> Calibration:
    return Calibration(data, config=QUICK, device="cpu", workers=0, **options)


def images(samples: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, int]]:
    return [(sample["pixel_values"], 0) for sample in samples]


def converted(model: nn.Module, calib: Calibration, **budget: Any) -> nn.Module:
    scheme = "auto" if "bytes" in budget else "lowrank"
    return tiedconv.convert(model, scheme, calib=calib, **(budget or {"params": "70%"}))


def told(model: nn.Module) -> Mapping[str, Any]:
    record: Mapping[str, Any] = state_of(model).history[-1]["calibration"]
    return record


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("budget", [{"params": "70%"}, {"bytes": "25%"}], ids=str)
def test_a_model_of_two_towers_is_calibrated_on_pairs(budget: dict[str, str]) -> None:
    model, samples = clip(), pairs(24)
    tied = converted(model, calibration(samples), **budget)
    record = told(tied)
    assert record["images"] == 24
    assert record["agreement"]["compares"] == "cosine of the embeddings"
    assert record["kl_after"] <= record["kl_before"]
    assert hooks(model) == hooks(tied) == 0
    whole = {n: torch.stack([torch.as_tensor(s[n]) for s in samples[:5]])
             for n in ("pixel_values", "input_ids", "attention_mask")}  # fmt: skip
    with torch.no_grad():
        found, known = tied(**whole), model(**whole)
    for name in ("image_embeds", "text_embeds"):
        assert torch.cosine_similarity(found[name], known[name]).mean() > 0.9


def test_images_alone_come_with_random_text_which_is_told() -> None:
    events: list[Event] = []
    tied = converted(clip(), calibration(images(pairs(16)), on_event=events.append))
    assert sum(isinstance(event, DrawnText) for event in events) == 1
    assert told(tied)["agreement"]["compares"] == "cosine of the embeddings"


def test_random_text_depends_on_the_image_alone() -> None:
    model, shown = clip(), torch.stack([image for image, _ in images(pairs(6))])
    whole = random_text(model, shown)
    assert whole.shape == (6, 16)
    assert torch.equal(whole[3:], random_text(model, shown[3:]))
    assert len({tuple(row.tolist()) for row in whole}) == 6
    assert whole.min() >= 0
    assert whole.max() < TOKENS
    assert set(whole[:, 0].tolist()) == {0}
    assert set(whole[:, -1].tolist()) == {98}


@pytest.mark.parametrize("output", ["image_embeds", lambda found: {"seen": found.image_embeds}])
def test_only_the_chosen_output_is_compared(output: Any) -> None:
    tied = converted(clip(), calibration(pairs(12), output=output))
    assert told(tied)["agreement"]["compares"] == "cosine of the features"


def test_an_output_that_the_model_has_not_is_told() -> None:
    with raises(UserError, "unknown-output"):
        converted(clip(), calibration(pairs(12), output="pooled"))


def test_a_bytes_budget_without_images_is_decided_on_random_images_and_text() -> None:
    tied = tiedconv.convert(clip(), "auto", bytes="25%")
    assert state_of(tied).history[-1]["rounding"]["cost"] > 0


def test_text_alone_calibrates_a_model_of_text() -> None:
    model = bert()
    samples = [{k: s[k] for k in ("input_ids", "attention_mask")} for s in pairs(24)]
    by_plain = tiedconv.convert(model, "lowrank", params="60%")
    by_text = tiedconv.convert(model, "lowrank", params="60%", calib=calibration(samples))
    held = {k: torch.tensor([s[k] for s in samples]) for k in samples[0]}
    with torch.no_grad():
        known = model(**held).last_hidden_state
        off = [float((m(**held).last_hidden_state - known).norm()) for m in (by_plain, by_text)]
    assert off[1] < 0.8 * off[0]


def test_plan_and_sensitivity_take_such_samples_too() -> None:
    found = compare(clip(), ["80%"], calib=calibration(pairs(8)))
    assert found.images == 6  # two are held out
    assert all(cell.cost is not None for row in found.rows for cell in row.cells if cell.stored)
    sensed = sensitivity(clip(), calibration(pairs(8)), measure=True)
    assert any(row.measured for row in sensed.rows)


def test_texts_of_other_lengths_are_run_by_themselves() -> None:
    tied = converted(clip(), calibration([*pairs(4), *pairs(4, tokens=5)]))
    assert told(tied)["images"] == 8


def test_a_text_that_is_longer_than_the_model_reads_is_refused() -> None:
    with raises(DataError, "samples-differ"):
        converted(clip(), calibration([*pairs(4), *pairs(4, tokens=25)]))


def test_images_of_other_sizes_are_refused() -> None:
    mixed = [*images(pairs(3)), (torch.zeros(3, 16, 32), 0)]
    with raises(DataError, "samples-differ"):
        converted(clip(), calibration(mixed))


@pytest.mark.parametrize(
    "sample", [{"image": torch.zeros(3, 32, 32)}, {"pixel_values": "photo.jpg"}, {"labels": 1}]
)
def test_samples_that_the_model_does_not_take_are_refused(sample: dict[str, Any]) -> None:
    with raises(UserError, "inputs-unknown"):
        converted(clip(), calibration([sample] * 4))


class Noisy(nn.Module):
    """Draws random numbers in evaluation, as masked pretraining does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(len(x), 16) > 0.5
        hidden: Tensor = self.down(self.up(x.flatten(1)[:, :16] * keep).relu())
        return hidden


def test_a_model_that_draws_random_numbers_is_compared_on_the_same_ones() -> None:
    tied = tiedconv.convert(Noisy(), "lowrank", rank=16, calib=calibration(images(pairs(16))))
    assert told(tied)["agreement"]["mean"] == pytest.approx(1, abs=1e-4)


def test_random_numbers_of_others_go_on_as_they_were() -> None:
    model, x = Noisy(), torch.randn(2, 3, 4, 4)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with same_random_numbers(model), torch.no_grad():
        assert torch.equal(model(x), model(x))
    assert torch.equal(torch.rand(3), expected)
    assert hooks(model) == 0
