"""A run never ends below its start, and finds a learning rate that suits the model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import slow_unless
from torch import nn
from training_helpers import QUICK, assert_same, make_data, make_net, run

from tiedconv.training import Event, TrainConfig
from tiedconv.training.best_state import BestState, check_steps
from tiedconv.training.device import Placement
from tiedconv.training.distributed import ALONE
from tiedconv.training.events import Checkpointed, KeptBest, RateFound
from tiedconv.training.held_out import HeldOutLoss
from tiedconv.training.lr_range import TRIED, images_for
from tiedconv.training.objective import Objective
from tiedconv.training.wrappers import TrainWrapper

CPU = torch.device("cpu")
HARMFUL = replace(QUICK, lr=3.0, clip=0.0, augment="none")


def trained() -> nn.Module:
    """A network that further training with a huge learning rate only harms."""
    model = make_net()
    run(model, replace(QUICK, keep_best=False))
    return model


def held_out(model: nn.Module, teacher: nn.Module | None = None) -> float:
    config = replace(QUICK, augment="none")
    objective = Objective(config, model, model, teacher, None, Placement(CPU))
    return HeldOutLoss(make_data(48, 1), objective, TrainWrapper(model), ALONE).measure()


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_that_only_loses_ends_with_the_bits_of_its_start(ema: float) -> None:
    model = trained()
    before = copy.deepcopy(model)
    events: list[Event] = []
    result = run(model, replace(HARMFUL, ema=ema), on_event=events.append)
    assert_same(before, model)
    assert result.kept_step == 0
    assert result.metrics == result.metrics_before
    (kept,) = [event for event in events if isinstance(event, KeptBest)]
    assert kept == KeptBest(0, result.steps, kept.start, kept.start)
    lost = copy.deepcopy(before)
    run(lost, replace(HARMFUL, ema=ema, keep_best=False))
    assert held_out(lost) > kept.start


def test_a_run_that_gains_ends_with_the_best_of_its_states() -> None:
    model = make_net()
    before = held_out(model)
    result = run(model)
    assert held_out(model) < before
    assert result.kept_step is not None
    assert result.kept_step > 0
    assert result.top1 > result.top1_before


def test_without_it_the_last_state_stays() -> None:
    model = trained()
    before = copy.deepcopy(model)
    result = run(model, replace(HARMFUL, keep_best=False))
    assert result.kept_step is None
    assert not torch.equal(before.conv.weight, model.conv.weight)


class _Interrupted(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("after", slow_unless([1, 2, 3], [2]))
@pytest.mark.parametrize("config", [HARMFUL, replace(QUICK, lr=None)], ids=["loses", "gains"])
def test_a_resumed_run_ends_with_the_same_best_state(
    tmp_path: Path, config: TrainConfig, after: int
) -> None:
    whole, halved = trained(), trained()
    expected = run(whole, replace(config, epochs=3))
    seen = 0

    def interrupt(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, Checkpointed)
        if seen == after:
            raise _Interrupted

    options: dict[str, Any] = {"checkpoint_dir": tmp_path / "run"}
    with pytest.raises(_Interrupted):
        run(halved, replace(config, epochs=3), on_event=interrupt, **options)
    again = trained()
    result = run(again, replace(config, epochs=3), resume=True, **options)
    assert_same(whole, again)
    assert (result.kept_step, result.lr, result.metrics) == (
        expected.kept_step, expected.lr, expected.metrics,
    )  # fmt: skip


def test_steps_that_are_looked_at() -> None:
    assert check_steps(80, 100, 48, None) == {10, 20, 30, 40, 50, 60, 70}
    assert check_steps(80, 100, 48, 20) == {10, 30, 50, 70}  # the others are ends of epochs
    assert check_steps(80, 10, 100, None) == {40}  # of few training images
    assert check_steps(40, 16, 212, None) == frozenset()
    assert check_steps(1, 64, 1, None) == frozenset()
    assert check_steps(3, 512, 4, None) == {1, 2}


def test_the_first_state_is_kept_even_if_its_loss_is_no_number() -> None:
    model = nn.Linear(2, 2)
    best = BestState(model)
    best.consider(0, float("nan"))
    best.consider(1, float("nan"))
    assert best.step == 0


def test_statistics_of_batch_norms_are_kept_only_where_they_help() -> None:
    """With a rate near zero nothing changes but the statistics, which fit no more data better."""
    model = trained()
    before = copy.deepcopy(model)
    loss = held_out(model)
    run(model, replace(QUICK, lr=1e-12, weight_decay=0.0))
    assert held_out(model) <= loss
    torch.testing.assert_close(before.conv.weight, model.conv.weight, atol=1e-6, rtol=0)


def test_a_rate_is_found_that_lowers_the_loss() -> None:
    events: list[Event] = []
    model = trained()
    before = copy.deepcopy(model)
    result = run(
        model, replace(QUICK, lr=None, augment="none"), teacher=before, on_event=events.append
    )
    (found,) = [event for event in events if isinstance(event, RateFound)]
    assert set(found.tried) <= {5e-4 * factor for factor in TRIED}
    assert result.lr == found.lr <= 5e-4
    assert found.tried[min(found.tried)] < 1.05 * found.start


def test_a_steep_model_gets_a_smaller_rate() -> None:
    """The same function with parameters a hundredth as large: the same step is too long."""

    class Scaled(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.net, self.factor = make_net(), factor
            with torch.no_grad():
                for parameter in self.net.parameters():
                    parameter.div_(factor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights = {n: p * self.factor for n, p in self.net.named_parameters()}
            out: torch.Tensor = torch.func.functional_call(self.net, weights, (x,))
            return out

    rates = []
    for factor in (1.0, 200.0):
        torch.manual_seed(0)
        rates.append(run(Scaled(factor), replace(QUICK, epochs=1, lr=None)).lr)
    assert rates[1] < rates[0]


def test_the_rate_of_sgd_is_of_its_own_size() -> None:
    for factor in (1.0, 100.0):
        teacher = make_net(1)
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.mul_(factor)
        config = replace(QUICK, epochs=1, lr=None, optimizer="sgd", distill_weight=1.0)
        result = run(make_net(), config, teacher=teacher)
        assert 5e-4 <= result.lr <= 0.05


def test_a_rate_costs_at_most_a_twentieth_of_a_long_run() -> None:
    for steps, batch in ((1000, 64), (200, 16), (10_000, 256)):
        for teacher in (True, False):
            forward = images_for(steps, batch, teacher) * (1 + teacher) * (len(TRIED) + 1)
            assert forward <= steps * batch * (3 + teacher) / 20
