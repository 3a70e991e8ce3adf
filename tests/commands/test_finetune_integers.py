"""Fine-tuning of a file whose weights are integers: they are trained, packed again, and fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_helpers import SPEC, World, figures, run

import tiedconv
from tiedconv.commands import finetune as commands
from tiedconv.commands.finetune import finetune, pack
from tiedconv.core.packed_codes import integers_of, unpacked
from tiedconv.io.checkpoint import size_of_model
from tiedconv.runtime import soft_codes
from tiedconv.runtime.soft_codes import LR_SCALES, TOWARDS_ZERO, harden, soften
from tiedconv.runtime.tie import state_of
from tiedconv.training import Event, TrainConfig
from tiedconv.training.events import Checkpointed

CONFIG = TrainConfig(
    steps=12, epochs=None, batch_size=8, distill_weight=1.0, augment="none", workers=0
)


@pytest.fixture(scope="module")
def rounded(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ViT at few bits."""
    path = tmp_path_factory.mktemp("bytes") / "m.safetensors"
    from cli_helpers import MODEL_ARGS

    run("convert", SPEC, *MODEL_ARGS, "--weights", world.weights, "--bytes", "18%", "-o", path)
    return path


def codes_of(path: Path) -> dict[str, torch.Tensor]:
    model = tiedconv.load(path)
    return {name: model.get_parameter(name).detach().clone() for name in state_of(model).plan.codes}


def trained(rounded: Path, world: World, output: Path, **options: Any) -> Any:
    return finetune(
        rounded, world.data, output, CONFIG, teacher=str(world.weights), device="cpu", **options
    )


def test_integers_are_trained_and_the_file_keeps_its_budget(
    rounded: Path, world: World, tmp_path: Path
) -> None:
    output = tmp_path / "o.safetensors"
    done = trained(rounded, world, output)
    before, after = codes_of(rounded), codes_of(output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(t.dtype == torch.uint8 for t in after.values())
    history = state_of(tiedconv.load(output)).history
    assert done.size == output.stat().st_size <= history[0]["rounding"]["bytes"]
    assert history[-1]["kept_step"] == done.result.kept_step > 0
    figures("verify", output)


def test_a_budget_that_is_missed_is_said(
    rounded: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiedconv.load(rounded)
    budget = state_of(model).history[0]["rounding"]["bytes"]
    soften(model)
    assert pack(model) is None
    # As if the trained integers were larger, and nothing could be done about it.
    monkeypatch.setattr(commands, "size_of_model", lambda _: budget + 1)
    monkeypatch.setattr(soft_codes, "TOWARDS_ZERO", (0.0,))
    monkeypatch.setattr(soft_codes, "LONGER", ())
    said = run(
        "finetune", rounded, "--data", world.data, "--teacher", world.weights, "--distill", 1,
        "--steps", 1, "--batch-size", 8, "--workers", 0, "--no-picture",
        "-o", tmp_path / "o.safetensors",
    )  # fmt: skip
    assert "larger than" in said.stderr
    done = trained(rounded, world, tmp_path / "p.safetensors")
    assert done.missed_budget == budget


def test_a_resumed_run_ends_with_the_same_file(rounded: Path, world: World, tmp_path: Path) -> None:
    whole, halved = tmp_path / "whole.safetensors", tmp_path / "halved.safetensors"
    trained(rounded, world, whole)

    def interrupt(event: Event) -> None:
        if isinstance(event, Checkpointed):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(rounded, world, halved, on_event=interrupt)
    trained(rounded, world, halved, resume=True)
    one, two = tiedconv.load(whole).state_dict(), tiedconv.load(halved).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_softened_integers_compute_the_same_and_pack_to_the_same_bits(rounded: Path) -> None:
    model = tiedconv.load(rounded)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        soften(model)
        assert torch.equal(model(x), expected)
    rates = getattr(model, LR_SCALES)
    assert all(rate > 0 for rate in rates.values())
    assert harden(model)
    assert not hasattr(model, LR_SCALES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_integers_are_made_smaller_until_the_file_fits(rounded: Path) -> None:
    model = tiedconv.load(rounded)
    size = size_of_model(model)
    soften(model)
    assert harden(model, lambda: size_of_model(model) <= 0.995 * size)
    assert size_of_model(model) <= 0.995 * size
    soften(model)
    assert not harden(model, lambda: False)


def test_no_value_is_rounded_further_than_the_margin() -> None:
    """Small integers take fewer bits; what is clearly nearer to another stays there."""
    values = torch.tensor([-2.58, -2.52, -2.4, -0.55, -0.5, 0.0, 0.49, 0.55, 0.65, 1.5, 3.54])
    expected = {
        0.0: [-3, -3, -2, -1, 0, 0, 0, 1, 1, 2, 4],
        0.05001: [-3, -2, -2, 0, 0, 0, 0, 0, 1, 1, 3],
        0.1: [-2, -2, -2, 0, 0, 0, 0, 0, 1, 1, 3],
    }
    for margin, wanted in expected.items():
        assert soft_codes._rounded(values, margin).int().tolist() == wanted


def test_integers_that_must_be_smaller_stay_near_what_was_trained(rounded: Path) -> None:
    """Longer steps would move all of them, the largest by whole steps."""
    model = tiedconv.load(rounded)
    state = state_of(model)
    soften(model)
    generator = torch.Generator().manual_seed(0)
    masters = {name: model.get_parameter(name).data for name in state.plan.codes}
    for value in masters.values():
        value += torch.rand(value.shape, generator=generator) - 0.5
    kept = {name: value.clone() for name, value in masters.items()}
    harden(model)
    most = size_of_model(model) - 8
    soften(model)
    for name, value in kept.items():
        model.get_parameter(name).data.copy_(value)
    assert harden(model, lambda: size_of_model(model) <= most)
    for name, value in kept.items():
        node = state.plan.codes[name]
        found = unpacked(model.get_parameter(name), node.shape, node.bits)
        low, high = integers_of(node.bits)
        assert float((found - value.clamp(low, high)).abs().max()) <= 0.5 + max(TOWARDS_ZERO)
