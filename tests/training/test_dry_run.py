"""What a training takes: measured in a few steps, and made to fit a time."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_helpers import QUICK, World, figures, files_of, refused, run
from error_codes import raises
from torch import Tensor, nn
from training_helpers import QUICK as CONFIG
from training_helpers import assert_same, make_data, make_net
from training_helpers import run as train_net

import tiedconv
from tiedconv.errors import DataError, UserError
from tiedconv.training import (
    Event,
    NotCompiled,
    Start,
    Throughput,
    TrainConfig,
    batching,
    find_batch_size,
    forecast,
)


def arguments(world: World, output: Path, *more: object) -> list[object]:
    return [
        "finetune", world.tied, "--data", world.data, "-o", output, *QUICK, "--teacher",
        world.weights, *more,
    ]  # fmt: skip


class Slow(nn.Module):
    """A model whose passes take a known time."""

    def __init__(self, seconds: float, broken_for: int = 10**9) -> None:
        super().__init__()
        self.net, self.seconds, self.broken_for = make_net(), seconds, broken_for
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.broken_for:
            torch.empty(2**58, dtype=torch.uint8)  # more than any machine has
        time.sleep(self.seconds)
        out: Tensor = self.net(x)
        return out


def test_a_forecast_measures_and_changes_nothing() -> None:
    model = Slow(0.02)
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    config = replace(CONFIG, epochs=7, bn_recalibrate=0)
    found = forecast(model, make_data(), make_data(48, 1), config, device="cpu")
    assert_same(before, model)
    assert torch.equal(state, torch.get_rng_state())
    assert (found.steps, found.epochs, found.images, found.val_images) == (42, 7, 96, 48)
    assert found.trained == sum(p.numel() for p in model.parameters())
    assert 0.02 <= found.pace.step_seconds < 0.2
    assert found.pace.images_per_second == pytest.approx(16 / found.pace.step_seconds, rel=0.01)
    assert 3 * 0.02 <= found.pace.eval_seconds < 0.6
    assert found.seconds == pytest.approx(
        42 * found.pace.step_seconds
        + 8 * found.pace.eval_seconds
        + (1 + 2 + 7) * found.pace.look_seconds  # at the start, twice on the way, after each epoch
    )  # fmt: skip
    assert found.pace.memory > 10**7
    # And a training after it is the training without it.
    plain = make_net()
    forecast(model.net, make_data(), make_data(48, 1), CONFIG, device="cpu")
    train_net(model.net)
    train_net(plain)
    assert_same(plain, model.net)


@pytest.mark.slow
def test_a_forecast_counts_the_look_that_the_teacher_takes_at_the_validation_images() -> None:
    data, teacher = (make_data(), make_data(48, 1)), Slow(0.1)
    found = forecast(make_net(), *data, CONFIG, teacher=teacher, device="cpu")
    rest = found.pace.seconds_of(found.steps, 6, CONFIG)
    assert 3 * 0.1 <= found.seconds - rest < 1.0  # three batches of the 48 images


def test_a_forecast_of_few_images_takes_them_again_and_again() -> None:
    found = forecast(Slow(0.01), make_data(6), make_data(3, 1), CONFIG, device="cpu")
    assert found.steps == 3
    assert found.pace.step_seconds >= 0.01


@pytest.mark.parametrize("every", [True, False])
def test_steps_within_a_time(every: bool) -> None:
    config = replace(CONFIG, eval_every_epoch=every)
    throughput = Throughput(step_seconds=0.5, images_per_second=1, eval_seconds=4.0, memory=0)
    steps = throughput.steps_within(1000, per_epoch=20, config=config)
    # The evaluation before the training is done when the time is asked for.
    assert 0.9 * 1000 < throughput.seconds_of(steps, 20, config) - 4.0 <= 1000
    assert throughput.steps_within(1, 20, config) < 1
    slower = replace(throughput, norm_seconds=2.0)
    steps = slower.steps_within(1000, per_epoch=20, config=config)
    assert 0.9 * 1000 < slower.seconds_of(steps, 20, config) - 4.0 <= 1000


@pytest.mark.slow
def test_a_time_that_evaluations_alone_take_up_is_refused() -> None:
    config = replace(CONFIG, epochs=None, time_budget=0.2)
    for call in (train_net, lambda *a: forecast(a[0], make_data(), make_data(48, 1), a[1])):
        with raises(UserError, "time-budget-too-small"):
            call(Slow(0.1), config)


@pytest.mark.slow
def test_the_statistics_of_batch_norms_are_in_the_forecast() -> None:
    data = make_data(), make_data(48, 1)
    found = forecast(Slow(0.05), *data, replace(CONFIG, bn_recalibrate=6), device="cpu")
    # Six batches of 16 images, and an evaluation of 48.
    assert found.pace.norm_seconds == pytest.approx(2 * found.pace.eval_seconds)
    found = forecast(Slow(0.05), *data, replace(CONFIG, bn_recalibrate=0), device="cpu")
    assert found.pace.norm_seconds == 0


@pytest.mark.usefixtures("_only_sleep_takes_time")
def test_a_time_budget_is_kept_and_reported() -> None:
    events: list[Event] = []
    config = replace(CONFIG, epochs=None, time_budget=3.0, eval_every_epoch=False)
    start = time.monotonic()
    result = train_net(Slow(0.03), config, on_event=events.append)
    assert 2.5 < time.monotonic() - start <= 3.0
    starts = [event for event in events if isinstance(event, Start)]
    assert starts[-1].steps == result.steps > 10


def test_a_resumed_run_keeps_the_steps_of_its_budget(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=None, time_budget=0.8)
    options: dict[str, Any] = {"checkpoint_dir": tmp_path}
    first = train_net(make_net(), config, **options)
    again = train_net(make_net(), config, resume=True, **options)
    assert again.steps == first.steps


def test_batches_grow_while_they_fit_and_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[float] = []
    clock = SimpleNamespace(perf_counter=lambda: sum(ticks))  # no load of the machine moves it
    monkeypatch.setattr(batching, "time", clock)

    def timed(broken_for: int = 10**9) -> Slow:
        """All sizes take the same time, so the largest is fastest."""
        model = Slow(0, broken_for)
        model.net.register_forward_hook(lambda *_: ticks.append(0.02))
        return model

    data = make_data(96 * 16)
    quick = timed(broken_for=50)
    options: dict[str, Any] = {"device": "cpu", "train_data": data, "val_data": make_data(48, 1)}
    before = copy.deepcopy(quick)
    assert find_batch_size(quick, config=CONFIG, **options) == 32
    assert_same(before, quick)
    assert max(quick.sizes) == 64
    # Sixteen steps are left in an epoch.
    assert find_batch_size(timed(), config=CONFIG, **options) == 64
    with raises(UserError, "out-of-memory"):
        find_batch_size(Slow(0, broken_for=4), config=CONFIG, **options)
    result = train_net(timed(broken_for=50), replace(CONFIG, batch_size=0), train_data=data)
    assert (result.batch_size, result.steps) == (32, 3 * 48)


def test_an_error_that_is_not_of_memory_is_not_taken_for_one() -> None:
    class Odd(Slow):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                raise RuntimeError("a bug of the model")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="a bug of the model"):
        find_batch_size(Odd(0), make_data(1536), make_data(48, 1), CONFIG, device="cpu")


def test_where_nothing_compiles_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: object) -> Any:
        def compiled(images: Tensor) -> Tensor:
            raise RuntimeError("no compiler\nin this place")

        return compiled

    events: list[Event] = []
    plain, model = make_net(), make_net()
    train_net(plain)
    monkeypatch.setattr(torch, "compile", broken)
    train_net(model, replace(CONFIG, compile=True), on_event=events.append)
    assert NotCompiled("no compiler") in events
    assert_same(plain, model)


def test_what_compiles_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def eager(call: Any) -> Any:
        def compiled(images: Tensor) -> Any:
            nonlocal calls
            calls += 1
            return call(images)

        return compiled

    plain, model = make_net(), make_net()
    train_net(plain)
    monkeypatch.setattr(torch, "compile", eager)
    train_net(model, replace(CONFIG, compile=True))
    assert calls == 18 + 1  # one to try it
    assert_same(plain, model)


@pytest.mark.slow
def test_no_image_at_all_is_an_error() -> None:
    from training_helpers import Flawed

    data = Flawed(make_data(6), set(range(6)))
    with raises(DataError, "no-readable-image"):
        forecast(make_net(), data, make_data(3, 1), TrainConfig(), device="cpu")


def test_a_dry_run_reports_and_writes_nothing(world: World, tmp_path: Path) -> None:
    reported = run(*arguments(world, tmp_path / "o.safetensors", "--epochs", 5, "--dry-run")).stdout
    for word in ("learning rate", "images/s", "Nothing was written", "20,611"):
        assert word in reported
    found = figures(*arguments(world, tmp_path / "o.safetensors", "--epochs", 5, "--dry-run"))
    assert found["steps"] == 15
    assert files_of(tmp_path) == set()


def test_lengths_of_the_command(world: World, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    for text in ("abc", "0", "-5m", "1.5h", ""):
        refused(*arguments(world, out, "--time-budget", text), error_code="invalid-duration")
    refused(
        *arguments(world, out, "--time-budget", "1m", "--steps", 2), error_code="options-conflict"
    )
    for text in ("x", "0", "-2"):
        refused(*arguments(world, out, "--batch-size", text), error_code="invalid-batch-size")


@pytest.mark.slow
def test_a_size_that_was_found_stands_in_the_history(world: World, tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    run(*arguments(world, out, "--batch-size", "auto", "--time-budget", "5s"))
    options = tiedconv.report(out).history[-1]["options"]
    assert options["batch_size"] == 8
    assert options["time_budget"] == 5.0
