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
from tiedconv.io.checkpoint import size_of_model
from tiedconv.runtime import soft_codes
from tiedconv.runtime.soft_codes import LR_SCALES, harden, soften
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
    # As if the trained integers were larger, and steps could not be lengthened.
    monkeypatch.setattr(commands, "size_of_model", lambda _: budget + 1)
    monkeypatch.setattr(soft_codes, "COARSER", (1.0,))
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


def test_steps_are_lengthened_until_the_file_fits(rounded: Path) -> None:
    model = tiedconv.load(rounded)
    size = size_of_model(model)
    soften(model)
    assert harden(model, lambda: size_of_model(model) <= 0.995 * size)
    assert size_of_model(model) <= 0.995 * size
    soften(model)
    assert not harden(model, lambda: False)
