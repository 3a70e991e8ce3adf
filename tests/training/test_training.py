"""The training loop and its parts, on problems that a few seconds can learn."""

from __future__ import annotations

import copy
import errno
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from error_codes import raises
from torch import Tensor, nn
from training_helpers import QUICK, Flawed, TiedNet, assert_same, make_data, make_net, run

from tiedconv.data import Loader, TensorList
from tiedconv.errors import CheckpointError, DataError, OutputError, TrainingError, UserError
from tiedconv.io import run_state
from tiedconv.io.run_state import read_state
from tiedconv.training import (
    Baseline,
    Checkpointed,
    EpochEnd,
    EvalStep,
    Event,
    Resumed,
    Skipped,
    Start,
    Step,
    TeacherScore,
    TrainConfig,
    TrainResult,
    distillation_loss,
    engine,
    evaluate_model,
    has_batchnorm,
    learning_rate,
    logits_of,
    parameter_groups,
    pick_device,
    recalibrate_batchnorm,
    with_teacher_labels,
)
from tiedconv.training.device import Placement, is_convolutional

CPU = torch.device("cpu")


# --- the whole loop ----------------------------------------------------------------------------


def test_training_learns_and_reports() -> None:
    events: list[Event] = []
    model = make_net().eval()
    result = run(model, replace(QUICK, epochs=8), on_event=events.append)
    assert result.top1 > 0.9 > result.top1_before
    assert result.top5 == 1
    assert (result.epochs, result.steps, result.images, result.skipped) == (8, 48, 768, 0)
    assert events[0] == Start(48, 8, 96)
    reported = [event for event in events if not isinstance(event, EvalStep)]  # those take a while
    assert isinstance(reported[1], Baseline)
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [end.epoch for end in ends] == list(range(1, 9))
    assert ends[-1].metrics["top1"] == result.top1 == result.history[-1]["top1"]
    assert ends[-1].loss == result.loss < ends[0].loss
    last = [event for event in events if isinstance(event, Step)][-1]
    assert (last.step, last.eta_seconds) == (48, 0)
    assert math.isclose(last.lr, QUICK.lr * QUICK.min_lr)
    assert not model.training  # as it came
    again = evaluate_model(model, make_data(48, 1), device="cpu")
    assert (again.top1, again.images, again.outputs) == (result.top1, 48, 3)


@pytest.mark.usefixtures("_only_sleep_takes_time")
def test_the_time_left_has_the_evaluations_in_it() -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.03 if self.training else 0.1)
            out: Tensor = self.net(x)
            return out

    for every, evaluations in ((True, 3), (False, 1)):  # after the first epoch's own
        events: list[Event] = []
        config = replace(QUICK, epochs=4, bn_recalibrate=0, eval_every_epoch=every)
        run(Slow(), config, on_event=events.append)
        first = next(event for event in events if isinstance(event, Step))
        # Before each evaluation, two batches each, and at half of the way, if that is none.
        looks = evaluations + (not every)
        assert first.eta_seconds == pytest.approx(
            0.3 * evaluations + 0.2 * looks + 0.03 * (24 - first.step)  # batches: 3 and 6
        )
        assert [e for e in events if isinstance(e, Step)][-1].eta_seconds == 0


class Asked(nn.Module):
    """A teacher that counts what it is shown."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.net, self.images = make_net(1, classes), 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        out: Tensor = self.net(x)
        return out


def test_a_teacher_of_other_classes_is_refused_before_it_has_seen_all_images() -> None:
    teacher, events = Asked(4), list[Event]()
    with raises(UserError, "teacher-mismatch", "4 outputs", "model 3"):
        run(make_net(), teacher=teacher, on_event=events.append)
    assert teacher.images <= 4
    assert not events


def test_a_teacher_of_other_classes_is_not_scored_where_its_blocks_alone_teach() -> None:
    events: list[Event] = []
    config = replace(QUICK, distill_weight=0.0, epochs=1)
    result = run(make_net(), config, teacher=make_net(1, 4), on_event=events.append)
    assert math.isnan(result.top1_teacher)
    assert not any(isinstance(event, TeacherScore) for event in events)


def test_a_new_run_does_not_delete_the_states_of_another(tmp_path: Path) -> None:
    run(make_net(), checkpoint_dir=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with raises(UserError, "run-interrupted"):
        run(make_net(), checkpoint_dir=tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_the_state_is_saved_before_a_long_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LONG_EVALUATION", 0.0)
    events: list[Event] = []
    run(make_net(), checkpoint_dir=tmp_path, on_event=events.append)
    kinds = [e for e in events if isinstance(e, Checkpointed | EpochEnd)]
    assert [type(e).__name__ for e in kinds[:3]] == ["Checkpointed", "EpochEnd", "Checkpointed"]


@pytest.mark.slow
def test_the_teacher_is_scored_on_the_same_images_where_there_are_labels() -> None:
    master = make_net(1)
    run(master, replace(QUICK, epochs=4))
    known = evaluate_model(master, make_data(48, 1), device="cpu")
    reported: list[Event] = []
    result = run(make_net(), teacher=master, on_event=reported.append)
    assert (result.top1_teacher, result.top5_teacher) == (known.top1, known.top5)
    assert TeacherScore(known.metrics) in reported
    by_teacher = with_teacher_labels(make_data(48, 1), master, make_net(), QUICK, "cpu")
    for options in ({}, {"teacher": master, "val_data": by_teacher}):
        reported.clear()
        result = run(make_net(), on_event=reported.append, **options)
        assert result.metrics_teacher == {}
        assert math.isnan(result.top1_teacher)
        assert not any(isinstance(event, TeacherScore) for event in reported)


def test_the_same_seed_gives_the_same_bits_and_other_generators_are_left_alone() -> None:
    first, second, other = make_net(), make_net(), make_net()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run(first, train_data=make_data(augment="crop"))
    assert torch.equal(torch.rand(2), expected)
    run(second, train_data=make_data(augment="crop"))
    run(other, replace(QUICK, seed=6), train_data=make_data(augment="crop"))
    assert_same(first, second)
    assert not torch.equal(first.conv.weight, other.conv.weight)


@pytest.mark.parametrize("steps", [1, 6, 8])
def test_exactly_so_many_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    config = replace(QUICK, epochs=None, steps=steps, warmup=0.3)
    result = run(make_net(), config)
    assert len(rates) == result.steps == steps
    assert rates == [learning_rate(step, steps, config) for step in range(steps)]
    assert result.epochs == len(result.history) == -(-steps // 6)


def test_part_of_an_epoch_and_evaluation_at_the_end_only() -> None:
    result = run(make_net(), replace(QUICK, epochs=1.5, eval_every_epoch=False))
    assert result.steps == 9
    assert [entry["top1"] is None for entry in result.history] == [True, False]


def test_sgd_trains_too() -> None:
    assert run(make_net(), replace(QUICK, optimizer="sgd", lr=0.1)).loss < 1.0


def test_broken_images_are_left_out_and_counted_once() -> None:
    events: list[Event] = []
    data = Flawed(make_data(40), {3, 4, 17})
    val = Flawed(make_data(20, 1), {2})
    result = run(
        make_net(),
        replace(QUICK, workers=0),
        train_data=data,
        val_data=val,
        on_event=events.append,
    )
    assert result.skipped == 4
    assert result.images == 3 * 37
    skipped = [event for event in events if isinstance(event, Skipped)]
    assert [event.count for event in skipped] == [1, 3]
    assert skipped[0].example == "2.png"
    with raises(DataError, "no-readable-image", ".png"):
        run(
            make_net(),
            replace(QUICK, workers=0),
            train_data=Flawed(make_data(6), set(range(6))),
        )


def test_more_classes_than_outputs_is_an_error() -> None:
    with raises(DataError, "classes-mismatch", "3 classes", "2 outputs"):
        run(make_net(classes=2))
    data = make_data(6)
    data.classes = ("a", "b", "c", "d")  # type: ignore[attr-defined]
    with raises(DataError, "classes-mismatch", "4 classes", "3 outputs"):
        evaluate_model(make_net(), data, device="cpu")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, clip: float) -> None:
    class Fragile(TiedNet):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += self.training
            # After 8 of the steps: the second step of the second epoch.
            return super().forward(x) * (math.inf if self.calls == 8 and self.training else 1)

    torch.manual_seed(0)
    with raises(
        TrainingError, "loss-not-finite", "step 8 of 18", "step-000000006", "(step 6)", "0.01"
    ):
        run(Fragile(), replace(QUICK, clip=clip), checkpoint_dir=tmp_path)
    state = read_state(tmp_path / "step-000000006.safetensors", "training")
    assert state["progress"]["step"] == 6
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def test_bad_gradients_are_seen_in_their_own_step() -> None:
    class BadGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * math.nan

    class Bad(TiedNet):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = BadGradient.apply(super().forward(x))
            return out

    with raises(TrainingError, "loss-not-finite", "step 1 of 18"):
        run(Bad())


# --- distillation ------------------------------------------------------------------------------


def test_distillation_brings_the_student_nearer_to_its_teacher() -> None:
    teacher = make_net(1)
    run(teacher, replace(QUICK, epochs=4))
    before = copy.deepcopy(teacher.state_dict())
    student = make_net(2)
    data = make_data()
    images = data.images

    def distance() -> float:
        student.eval()
        with torch.no_grad():
            return distillation_loss(student(images), teacher(images), 2.0).item()

    teacher.eval()
    start = distance()
    config = replace(QUICK, epochs=12, distill_weight=1.0)
    run(student, config, train_data=data, teacher=teacher)
    assert distance() < 0.3 * start
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_distillation_loss_is_the_textbooks() -> None:
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, 3.0), expected)
    with raises(UserError, "teacher-mismatch", "4 outputs", "model 5"):
        distillation_loss(student, teacher[:, :4], 1.0)


def test_logits_are_found_in_what_models_return() -> None:
    logits = torch.randn(2, 3)
    for output in (logits, (logits, None), {"logits": logits}, SimpleNamespace(logits=logits)):
        assert torch.equal(logits_of(output), logits)
    assert logits_of(logits.bfloat16()).dtype == torch.float32
    with raises(UserError, "no-logits-returned", "returns str"):
        logits_of("cat")


# --- resume ------------------------------------------------------------------------------------


class Interruption(KeyboardInterrupt):
    pass


def interrupt_after_epoch(model: nn.Module) -> Any:
    def listen(event: Event) -> None:
        if isinstance(event, Checkpointed):
            raise Interruption

    return listen


def interrupt_in_second_epoch(model: nn.Module) -> Any:
    steps = 0

    def before_forward(module: nn.Module, args: Any) -> None:
        nonlocal steps
        steps += torch.is_grad_enabled()
        if steps == 9:
            raise Interruption

    model.register_forward_pre_hook(before_forward)
    return None


def without_times(result: TrainResult) -> dict[str, Any]:
    figures = asdict(result)
    for entry in (figures, *figures["history"]):
        del entry["seconds"]
    return figures


# In the second case the interrupted epoch is begun again.
@pytest.mark.parametrize("interrupt", [interrupt_after_epoch, interrupt_in_second_epoch])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, interrupt: Any) -> None:
    data = make_data(augment="crop")
    teacher = make_net(9)
    options: dict[str, Any] = {"train_data": data, "teacher": teacher}
    whole, parted, fresh = make_net(), make_net(), make_net(4)
    expected = run(whole, **options)
    listener = interrupt(parted)
    with pytest.raises(Interruption):
        run(parted, checkpoint_dir=tmp_path, on_event=listener, **options)
    events: list[Event] = []
    options |= {"checkpoint_dir": tmp_path, "resume": True, "on_event": events.append}
    result = run(fresh, **options)
    assert Resumed(1, 6) in events
    assert_same(whole, fresh)
    assert without_times(result) == without_times(expected)
    # Once finished, there is nothing left to do.
    third = make_net(5)
    assert run(third, **options) == result
    assert_same(whole, third)


def test_the_checkpoint_is_plain_data_and_nothing_else_is_left(tmp_path: Path) -> None:
    run(make_net(), checkpoint_dir=tmp_path / "new" / "folder")
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == [
        "step-000000012.safetensors", "step-000000018.safetensors"
    ]  # fmt: skip
    path = files[-1]
    state = read_state(path, "training")
    assert {"model", "optimizer", "progress", "history", "identity"} <= set(state)
    assert "tied/head/base" in state["model"]


def test_a_resume_must_be_of_the_same_run(tmp_path: Path) -> None:
    run(make_net(), replace(QUICK, epochs=1), checkpoint_dir=tmp_path)
    options: dict[str, Any] = {"checkpoint_dir": tmp_path, "resume": True}
    with raises(UserError, "state-of-other-run"):
        run(make_net(), replace(QUICK, lr=0.02), **options)
    with raises(UserError, "state-of-other-run", "training images 96 -> 60"):
        run(make_net(), replace(QUICK, epochs=1), train_data=make_data(60), **options)
    with raises(UserError, "checkpoint-mismatch"):
        run(make_net(classes=4), replace(QUICK, epochs=1), **options)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:500])
    with raises(CheckpointError, "state-damaged"):
        run(make_net(), **options)


def test_resuming_without_a_checkpoint(tmp_path: Path) -> None:
    with raises(UserError, "nothing-to-resume"):
        run(make_net(), resume=True)
    result = run(make_net(), replace(QUICK, epochs=1), checkpoint_dir=tmp_path, resume=True)
    assert result.steps == 6
    (tmp_path / "file").write_text("")
    with raises(OutputError, "folder-not-writable", "can't be written"):
        run(make_net(), checkpoint_dir=tmp_path / "file")


def test_a_disk_that_fills_up_leaves_the_last_state_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_net()
    run(whole, checkpoint_dir=tmp_path / "whole")
    write, written = run_state.save_tensors, []

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, metadata)

    monkeypatch.setattr(run_state, "save_tensors", full)
    folder = tmp_path / "parts"
    with raises(OutputError, "output-not-written"):
        run(make_net(), checkpoint_dir=folder)
    assert [file.name for file in folder.iterdir()] == ["step-000000006.safetensors"]
    monkeypatch.undo()
    resumed = make_net()
    run(resumed, checkpoint_dir=folder, resume=True)
    assert_same(whole, resumed)


def test_in_float16_a_resumed_run_has_the_scale_that_it_had(tmp_path: Path) -> None:
    config = replace(QUICK, amp="fp16")
    whole, parts = make_net(), make_net()
    run(whole, config, checkpoint_dir=tmp_path / "whole")

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnd) and event.epoch == 2:
            raise KeyboardInterrupt

    folder = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(parts, config, checkpoint_dir=folder, on_event=stop)
    scales = []
    for path in (
        folder / "step-000000006.safetensors",
        tmp_path / "whole" / "step-000000018.safetensors",
    ):
        scales.append(read_state(path, "training")["scaler"]["scale"])
    assert all(scale > 1 for scale in scales)
    resumed = make_net()
    run(resumed, config, checkpoint_dir=folder, resume=True)
    assert_same(whole, resumed)
    last = "step-000000018.safetensors"
    end = read_state(folder / last, "training")["scaler"]
    assert end == read_state(tmp_path / "whole" / last, "training")["scaler"]


# --- batch norm --------------------------------------------------------------------------------


def test_recalibration_averages_over_batches() -> None:
    norm = nn.BatchNorm2d(1)
    model = nn.Sequential(norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))
    norm.running_mean.fill_(7)
    weight = copy.deepcopy(model[3].weight)
    model.eval()
    images = make_data(40).images
    batches = list(Loader(TensorList(images, [0] * 40), 20).epoch())
    assert recalibrate_batchnorm(model, batches, Placement(CPU)) == 2
    halves = images.view(2, -1)
    torch.testing.assert_close(norm.running_mean, halves.mean(1).mean().view(1))
    torch.testing.assert_close(norm.running_var, halves.var(1).mean().view(1))
    assert torch.equal(model[3].weight, weight)
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())
    assert recalibrate_batchnorm(model, [], Placement(CPU)) == 0
    torch.testing.assert_close(norm.running_mean, halves.mean(1).mean().view(1))
    assert has_batchnorm(model)
    assert not has_batchnorm(nn.Sequential(nn.LayerNorm(3)))


def test_recalibration_can_be_left_out() -> None:
    fresh, averaged = make_net(), make_net()
    config = replace(QUICK, keep_best=False)
    run(fresh, config)
    run(averaged, replace(config, bn_recalibrate=0))
    assert torch.equal(fresh.conv.weight, averaged.conv.weight)
    assert not torch.equal(fresh.norm.running_mean, averaged.norm.running_mean)


# --- evaluation --------------------------------------------------------------------------------


class Lookup(nn.Module):
    """Gives the logits that the image itself holds."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


@pytest.mark.parametrize("classes", [3, 8])
def test_top1_top5_and_loss(classes: int) -> None:
    logits = torch.randn(30, classes)
    labels = torch.arange(30) % classes
    data = TensorList(logits.view(30, 1, 1, classes), labels)
    result = evaluate_model(Lookup(), data, batch_size=7, device="cpu")
    order = logits.argsort(dim=1, descending=True)
    assert result.top1 == pytest.approx((order[:, 0] == labels).double().mean().item())
    hits = (order[:, :5] == labels[:, None]).any(1).double().mean().item()
    assert result.top5 == pytest.approx(hits)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert (result.images, result.outputs, result.example_of_skipped) == (30, classes, None)


def test_evaluation_reports_broken_images_and_keeps_modes() -> None:
    model = make_net().train()
    model.norm.eval()
    events: list[Event] = []
    data = Flawed(make_data(10), {0, 4})
    result = evaluate_model(model, data, device="cpu", workers=0, on_event=events.append)
    assert (result.images, result.skipped, result.example_of_skipped) == (8, 2, "0.png")
    assert events == [Skipped(2, "0.png")]
    assert model.training
    assert not model.norm.training


# --- parts -------------------------------------------------------------------------------------


def test_no_weight_decay_on_what_is_not_a_weight() -> None:
    model = make_net()
    model.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
    model.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.same = model.conv  # used twice, trained once
    decayed, others = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {"tied/head/base", "conv.weight"}
    assert {names[id(p)] for p in others["params"]} == {
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "pos_embed",
        "cls_token",
    }
    with raises(UserError, "nothing-trainable"):
        parameter_groups(nn.Identity(), 0.1)


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(lr=1.0, warmup=0.2, min_lr=0.1)
    rates = [learning_rate(step, 21, config) for step in range(21)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[12] == pytest.approx(0.55)  # half way down
    assert rates[20] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(0, 1, config) == 1.0


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"epochs": 0}, "epochs is 0. Choose more than 0"),
        ({"steps": 0}, "steps is 0. Choose 1 or more"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"distill_weight": 1.5}, "distill_weight is 1.5. Choose 0 or more and at most 1"),
        ({"workers": -1}, "workers is -1"),
        ({"optimizer": "lion"}, "optimizer is 'lion'. Choose one of adamw, sgd"),
        ({"augment": "mixup"}, "augment is 'mixup'"),
        ({"amp": "fp8"}, "amp is 'fp8'"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"time_budget": 0.0}, "time_budget is 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], shown: str) -> None:
    with raises(UserError, "invalid-training-option", shown):
        TrainConfig(**options)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"epochs": None}, "length-missing"),
        ({"sharding": "fsdp", "progressive": 0.5}, "options-conflict"),
        ({"sharding": "fsdp", "amp": "fp16"}, "options-conflict"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], code: str) -> None:
    with raises(UserError, code):
        TrainConfig(**options)


def test_devices() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with raises(UserError, "unknown-device", "warp"):
        pick_device("warp")
    with raises(UserError, "unknown-device", "meta"):
        pick_device("meta")
    missing = f"cuda:{torch.cuda.device_count() if torch.cuda.is_available() else 0}"
    with raises(UserError, "device-missing", missing):
        pick_device(missing)


def test_convolutional_networks_get_channels_last_while_they_train() -> None:
    assert is_convolutional(make_net())
    assert is_convolutional(nn.Sequential(nn.Conv2d(4, 4, 1)))
    assert not is_convolutional(nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 8)))
    seen: list[bool] = []
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 3, 3), nn.AvgPool2d(4), nn.Flatten())
    parameter = model[1].weight
    model[1].register_forward_pre_hook(
        lambda module, args: seen.append(
            all(x.is_contiguous(memory_format=torch.channels_last) for x in (*args, module.weight))
        )
    )
    run(model, replace(QUICK, epochs=1))
    assert seen
    assert all(seen)
    assert model[1].weight is parameter
    assert parameter.is_contiguous()


def test_only_some_parameters_are_trained_and_all_are_trainable_again() -> None:
    model = make_net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = list(before)
    wanted = names[-1].rpartition(".")[0]
    run(model, replace(QUICK, epochs=1, only=(f"{wanted}.*",), keep_best=False))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in names if n.startswith(f"{wanted}.")}
    assert all(p.requires_grad for p in model.parameters())
    with raises(UserError, "unknown-parameter", "nothing.*"):
        run(model, replace(QUICK, only=("nothing.*",)))
