"""The whole AdaMixer of examples/adamixer: its sizes to the digit, its learning, its LORS form."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from adamixer import count, fitted, losses, settings
from adamixer.conversion import RECIPE, recipe_for, reset_lors
from adamixer.decoder import Decoder, decoder
from adamixer.detector import Detector, detector
from adamixer_helpers import EXAMPLES, SETTING, TINY, tiny_head, tiny_lors, tiny_maps, tiny_objects
from torch import nn

import tiedconv


def test_shapes_of_a_detector() -> None:
    model = detector("lors", "resnet18", **TINY).eval()
    with torch.no_grad():
        logits, found = model(torch.randn(2, 3, 64, 96))
    assert logits.shape == (3, 2, 6, 3)
    assert found.shape == (3, 2, 6, 4)
    # Untrained, no box moves from the whole image.
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.0, 0, 96, 64]), atol=1e-3, rtol=0)
    assert logits.sigmoid().mean() < 0.1


def test_a_resnet50_has_the_usual_channels() -> None:
    with torch.device("meta"):
        model = Detector("resnet50", None, SETTING)
    assert model.backbone.channels == [256, 512, 1024, 2048]


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="groups=3"):
        decoder(groups=3)


@pytest.mark.slow
def test_the_sizes_are_the_published_ones(capsys: pytest.CaptureFixture[str]) -> None:
    count.main()
    said = capsys.readouterr().out
    assert "| **decoder** | **110,272,296** | **35,354,408** |" in said
    readme = (EXAMPLES / "adamixer" / "README.md").read_text("utf-8")
    assert said.strip() in readme


def test_the_recipe_takes_the_whole_detector_too() -> None:
    with torch.device("meta"):
        model = Detector("resnet50", None, settings.LORS)
    plan = tiedconv.plan(model, recipe=tiedconv.Recipe.from_toml(RECIPE))
    saved = sum(count.stock_counts(settings.LORS).values()) - 35_354_408
    assert plan.original - plan.stored == saved


@pytest.fixture(params=["stock", "lors"])
def head(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    if request.param == "stock":
        yield tiny_head()
    else:
        model = tiny_lors()
        reset_lors(model)
        yield model


def test_every_parameter_learns(head: nn.Module) -> None:
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    start = {n: p.detach().clone() for n, p in head.named_parameters()}
    found = []
    for _ in range(12):
        loss = losses.set_loss(*head(tiny_maps()), tiny_objects())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        assert not torch.equal(parameter, start[name]), name


def test_the_papers_start_gives_all_stages_one_weight() -> None:
    model = tiny_lors()
    reset_lors(model)
    first, *others = model.decoder.stages
    for part in fitted.SHARED:
        weight = first.mixing.get_submodule(part).weight
        for stage in others:
            torch.testing.assert_close(stage.mixing.get_submodule(part).weight, weight)


def test_a_fit_is_nearer_to_the_trained_decoder_than_no_residual() -> None:
    stock = tiny_head()
    for name, parameter in stock.named_parameters():
        if name.endswith(tuple(f"{part}.weight" for part in fitted.SHARED)):
            nn.init.normal_(parameter, std=0.3)
    reference = fitted.trace(stock, tiny_maps())
    near = fitted.stage_errors(fitted.fitted(stock, recipe_for(SETTING)), reference)
    scratch = recipe_for(SETTING, scratch=True)
    far = fitted.stage_errors(fitted.zero_residual(stock, scratch), reference)
    assert all(a < b for a, b in zip(near, far, strict=True))


def test_saved_and_loaded_it_answers_the_same(tmp_path: Path) -> None:
    model = tiny_lors()
    tiedconv.save(model, tmp_path / "lors.safetensors")
    again = tiedconv.load(tmp_path / "lors.safetensors", model=tiny_head())
    with torch.no_grad():
        for a, b in zip(again(tiny_maps()), model(tiny_maps()), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["overfit", "speed"])
def test_scripts_start_from_anywhere(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "adamixer" / f"{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout


def test_a_decoder_is_a_model_by_its_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plan = tiedconv.plan(
        "adamixer.decoder:decoder",
        recipe=recipe_for(SETTING),
        model_args={"setting": "lors", **TINY},
    )
    assert plan.original == sum(p.numel() for p in Decoder(SETTING).parameters())
