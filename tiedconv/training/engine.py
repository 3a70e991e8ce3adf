"""The training loop.

A model is any `nn.Module` that returns logits. Some of its weights may be computed from others, so
the loop only uses `parameters()`, `state_dict()` and the modules' types.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from tiedconv.data import Batch
from tiedconv.errors import UserError
from tiedconv.training.batching import with_batch_size
from tiedconv.training.batchnorm import norms_of
from tiedconv.training.best_state import BestState
from tiedconv.training.blend import Blend, blend_weight, check_blend
from tiedconv.training.clock import Clock
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import seeds_apart
from tiedconv.training.distributed import init_distributed
from tiedconv.training.ema import Ema
from tiedconv.training.evaluation import (
    EVENT_SECONDS,
    EvalResult,
    require_some,
)
from tiedconv.training.events import (
    Baseline,
    EpochEnd,
    KeptBest,
    NotCompiled,
    OnEvent,
    RateFound,
    Resumed,
    Skipped,
    Start,
    Step,
    TeacherScore,
    ignore,
)
from tiedconv.training.losses import LossMeter
from tiedconv.training.lr_range import find_lr
from tiedconv.training.optim import learning_rate, trained_only
from tiedconv.training.results import TrainResult
from tiedconv.training.run import RunState
from tiedconv.training.signals import Interrupted
from tiedconv.training.state import StateFolder
from tiedconv.training.throughput import measure_throughput, require_time
from tiedconv.training.trainer import TrainerSetup

LONG_EVALUATION = 10.0
"""Seconds; before one that takes longer, the state is saved. A launcher that stops its processes
does not wait for the end of an evaluation."""

READ_SECONDS = 0.5
"""The longest time that a loss stays unread on the device, if steps are slow."""

LOOK_SECONDS = 2.0
"""Approximate interval at which processes exchange whether one was asked to stop."""


def train(
    model: nn.Module,
    train_data: Dataset[Any],
    val_data: Dataset[Any],
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    blend: Blend | None = None,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    made_of: Mapping[str, str] | None = None,
    started: float | None = None,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Trains a classifier in place; model and teacher are moved to the device and stay there.

    On the CPU a run that was interrupted and resumed ends with the same bits as one that was
    not, wherever it was interrupted. torch's global generators are left as they were. Started by
    `torchrun`, the processes share each batch; only the first reports and writes.

    Args:
        model: returns logits (B, classes) in any form that `logits_of` knows.
        train_data: gives (image, label); its transform does the augmentation.
        val_data: likewise, without augmentation.
        config: the options; the defaults if None.
        teacher: a model with the same classes, to be distilled.
        blend: a residual that is annealed to zero over the first `config.progressive` of the
            steps; evaluations leave it out.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        checkpoint_dir: where to keep the newest states, written after each epoch, before long
            evaluations, every `config.checkpoint_minutes`, and when SIGINT or SIGTERM asks the
            run to stop. If it holds some, `resume` must be set or they must be removed.
        resume: continue from the newest; where there is none, start at the beginning.
        made_of: names and values of what else must be the same when the run is resumed, such as
            digests of the model, the teacher and the data.
        started: start of the time budget, by `time.monotonic`; None for now.
        on_event: called with each event.

    Raises:
        UserError: options, device or checkpoint that don't fit.
        DataError: no image can be read, or labels that the model has no output for.
        TrainingError: the loss is not finite.
        Interrupted: a signal asked for it; the state was saved if there is a checkpoint_dir.
    """
    if resume and checkpoint_dir is None:
        raise UserError(
            "Nothing to resume from",
            hint="Give the checkpoint folder as well",
            code="nothing-to-resume",
        )
    config = config or TrainConfig()
    started = time.monotonic() if started is None else started
    check_blend(config, blend)
    folder = StateFolder(Path(checkpoint_dir), config.keep) if checkpoint_dir is not None else None
    with (
        init_distributed(device) as (processes, place),
        seeds_apart(place),
        trained_only(model, config.only),
    ):
        known = folder.batch_size() if resume and folder is not None else None
        config = with_batch_size(
            model, train_data, val_data, config, teacher=teacher, device=place, known=known
        )
        run = _Run(TrainerSetup(model, train_data, val_data, config, teacher, place, processes))
        run.listener = on_event if on_event is not None and processes.first else ignore
        run.blend = blend if config.progressive > 0 else None
        run.folder, run.made_of, run.started = folder, dict(made_of or {}), started
        return run.run(resume)


class _Run(RunState):
    """One call of `train`."""

    def run(self, resume: bool) -> TrainResult:
        """Trains to the end, and leaves the model as its caller may expect it."""
        if self.folder is not None and self.processes.first:
            self.folder.prepare(resume=resume)
        with self.setup.opened(), self.interrupts:
            try:
                result = self._train(resume)
                self.learner.finish()
                return result
            finally:
                if self.blend is not None:
                    self.blend.set(0.0)

    def _train(self, resume: bool) -> TrainResult:
        """Trains from the beginning or from the checkpoint to the end."""
        found = self.folder.load(self.identity()) if resume and self.folder is not None else None
        self.setup.dry_step()
        reason = self.setup.compile()
        if reason is not None:
            self.emit(NotCompiled(reason))
        if found is not None:
            if self.blend is not None:
                self.blend.begin()
            self.begin_average()
            if self.config.keep_best:
                self.best = BestState(self.model)
            self.load(*found)
            self.checks = self.setup.steps_to_look_at(self.steps)
            self.emit_start()
            self.emit(Resumed(len(self.history), self.at.step))
        else:
            if self.config.time_budget is None:
                self.emit_start()
            before = self.evaluate()
            self.begin_best()
            frozen = self.setup.batch_statistics_harm()
            lr = self.peak_lr(frozen)
            taught = self.evaluate_teacher()
            # After the baseline, which is of the model as given: the blend may change tensors.
            if self.blend is not None:
                self.blend.begin()
            if self.config.time_budget is not None:  # only now is known how many steps there are
                self.fit_to(self.config.time_budget)
                self.emit_start()
            self.at = replace(self.at, before=before.metrics, lr=lr, norms_frozen=frozen)
            self.emit(Baseline(before.metrics, before.loss))
            if taught is not None:
                self.at = replace(self.at, teacher=taught.metrics)
                self.emit(TeacherScore(taught.metrics))
            self.begin_average()
            self.checks = self.setup.steps_to_look_at(self.steps)
        self.saved = time.monotonic()
        while self.at.step < self.steps or len(self.history) < self.at.epoch:
            self.run_epoch()
        if self.ema is not None:
            self.ema.settle()
        self.end_with_best()
        return self.result()

    def peak_lr(self, frozen: bool) -> float:
        """The peak learning rate: as given, or found for the model and the data."""
        if self.config.lr is not None:
            return self.config.lr
        found, tried, start = find_lr(self.setup, self.steps, norms_frozen=frozen)
        self.emit(RateFound(found, tried, start))
        return found

    def begin_best(self) -> None:
        """Takes the start as the best state so far."""
        if self.config.keep_best:
            self.best = BestState(self.model)
            self.best.consider(0, self.setup.held_out.measure())

    @property
    def look_seconds(self) -> float:
        """How long one look at the held-out loss takes."""
        return 0.0 if self.best is None else self.setup.held_out.seconds

    def look(self) -> None:
        """Keeps the compact model as it is now, by its EMA weights, if it is the best so far."""
        if self.best is not None:
            with self.as_written():
                self.best.consider(self.at.step, self.setup.held_out.measure())

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Within it the model is as it would be written now."""
        averaged = self.ema.swapped() if self.ema is not None else nullcontext()
        with averaged, self.blend.left_out() if self.blend is not None else nullcontext():
            yield

    def end_with_best(self) -> None:
        """Returns to the best state, if it is not the last, and evaluates it."""
        if self.best is None:
            return
        if not self.best.is_last:
            self.best.restore()
            self.at = replace(self.at, ended=self.evaluate().metrics)
        self.at = replace(self.at, kept=self.best.step)
        self.emit(KeptBest(self.best.step, self.steps, self.best.start, self.best.loss))

    def emit_start(self) -> None:
        """Reports how long the training is."""
        epochs = -(-self.steps // len(self.loader))
        self.emit(Start(self.steps, epochs, self.loader.images, self.metrics))

    def fit_to(self, seconds: float) -> None:
        """Sets the number of steps that fit into a time; the first process decides."""
        evaluator = self.setup.evaluator
        norms = evaluator.norm_seconds(evaluator.seconds)
        throughput = measure_throughput(
            self.updater, self.loader, evaluator.seconds, norms, self.look_seconds
        )
        left = seconds - (time.monotonic() - self.started)
        steps = throughput.steps_within(left, len(self.loader), self.config)
        self.steps = require_time(self.processes.broadcast_int(steps), seconds, throughput)

    def begin_average(self) -> None:
        """Starts the EMA, if it is on; after the blend has started."""
        if self.config.ema > 0:
            self.ema = Ema(self.model, self.config.ema)

    def run_epoch(self) -> None:
        """Trains for an epoch, or what is left of it; evaluates and saves."""
        start = time.perf_counter()
        if len(self.history) == self.at.epoch:
            self.at = replace(self.at, epoch=self.at.epoch + 1, batch=0, loss=0.0, losses=0)
        try:
            loss = self.train_epoch()
            due = self.config.eval_every_epoch or self.at.step >= self.steps
            if due and self.setup.evaluator.seconds > LONG_EVALUATION:
                self.save()
            evaluation = self.evaluate_trained() if due else None
        except Interrupted:
            self.save()
            raise
        finally:
            self.at = replace(self.at, seconds=self.at.seconds + time.perf_counter() - start)
        metrics = evaluation.metrics if evaluation else {}
        seconds = time.perf_counter() - start
        self.history.append({
            "epoch": self.at.epoch, "loss": loss, **dict.fromkeys(self.metrics), **metrics,
            "seconds": seconds, "step": self.at.step,
        })  # fmt: skip
        self.emit(EpochEnd(self.at.epoch, loss, metrics, seconds, self.at.step))
        self.save()

    def train_epoch(self) -> float:
        """Takes the steps of one epoch that are still to be taken; returns the mean loss of all."""
        self.model.train()
        if self.at.norms_frozen:
            for norm in norms_of(self.model):
                norm.eval()
        meter = LossMeter(self.placement.device, total=self.at.loss, count=self.at.losses)
        meter.due = 1 if self.processes.several else meter.due  # until steps have been timed
        clock = Clock(self.at.step)
        known_broken = len(self.broken)
        if self.at.step < self.steps:
            for batch in self.loader.epoch(self.at.epoch, self.at.batch):
                self.take(batch, meter, clock)
                if self.at.step >= self.steps:
                    break
        self.read(meter, clock)
        self.check_signals()
        require_some(self.at.losses, self.broken)
        if len(self.broken) > known_broken:
            self.emit(Skipped(len(self.broken), next(iter(self.broken))))
        return meter.mean()

    def take(self, batch: Batch, meter: LossMeter, clock: Clock) -> None:
        """One step with a batch, and what is due after it."""
        self.broken.update(dict.fromkeys(batch.broken))
        index = self.at.batch
        self.at = replace(self.at, batch=index + 1)
        images = self.spare.instead_of_none(batch.images)
        if images is None:
            return
        lr = learning_rate(self.at.step, self.steps, self.config, self.at.lr)
        if self.blend is not None:
            self.blend.set(blend_weight(self.at.step, self.steps, self.config.progressive))
        weight = self.processes.count * len(batch.images) / self.loader.size(index)
        weight = weight if self.processes.several else 1.0
        labels = batch.labels if len(batch.labels) else torch.zeros(len(images), dtype=torch.int64)
        meter.add(self.updater.step(images, labels, lr, self.at.step, weight))
        if self.ema is not None:
            self.ema.update()
        clock.images += len(batch.images) * self.processes.count
        count = self.at.images + self.loader.size(index) - len(batch.broken)
        self.at = replace(self.at, step=self.at.step + 1, images=count)
        if self.at.step in self.checks:
            with clock.stopped():
                self.look()
        # Of several processes none may read alone, as they agree on what is due when they do.
        alone = not self.processes.several
        asked = self.interrupts.asked is not None
        if meter.full or (alone and (asked or clock.unread >= READ_SECONDS)):
            self.read(meter, clock)
            self.check_signals()
            if not alone:
                within = clock.steps_within(LOOK_SECONDS, self.at.step)
                meter.due = self.processes.broadcast_int(max(1, within))

    def read(self, meter: LossMeter, clock: Clock) -> None:
        """Reads the losses since the last time, and reports them at intervals."""
        first = self.at.step - meter.unread + 1
        losses = meter.read(self.processes)
        clock.read_now()
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self.diverged(step)
        self.at = replace(self.at, loss=meter.total, losses=meter.count)
        if losses and (self.at.step >= self.steps or clock.untold >= EVENT_SECONDS):
            lr = learning_rate(self.at.step - 1, self.steps, self.config, self.at.lr)
            speed, left = clock.report(self.at.step, self.steps)
            left += self.setup.evaluator.seconds_left(self.steps - self.at.step, self.look_seconds)
            left += self.look_seconds * sum(step > self.at.step for step in self.checks)
            self.emit(Step(self.at.epoch, self.at.step, tuple(losses), lr, speed, left))

    def check_signals(self) -> None:
        """Stops if a signal asked for it; saves if it is time."""
        minutes = (time.monotonic() - self.saved) / 60
        stop, save = self.processes.any(
            [self.interrupts.asked is not None, minutes >= self.config.checkpoint_minutes],
            self.placement.device,
        )
        if stop:
            raise Interrupted(self.interrupts.asked or signal.SIGTERM)
        if save and self.at.step < self.steps:
            self.save()

    def evaluate_trained(self) -> EvalResult:
        """Evaluates the compact model, by its EMA weights, with fresh BatchNorm statistics."""
        with self.as_written():
            if self.best is None:
                self.setup.evaluator.recalibrate()
            else:
                measure = self.setup.held_out.measure
                self.best.consider(self.at.step, self.setup.evaluator.recalibrate_if(measure))
            evaluation = self.evaluate()
        # The last update of an epoch has no later loss that would show its damage.
        if not math.isfinite(evaluation.loss):
            raise self.diverged(self.at.step)
        return evaluation

    def evaluate(self) -> EvalResult:
        """Evaluates the model as it is now."""
        result = self.setup.evaluator.evaluate(self.emit)
        if result.skipped > self.at.val_skipped:
            self.at = replace(self.at, val_skipped=result.skipped)
            self.emit(Skipped(result.skipped, result.example_of_skipped or ""))
        return result

    def evaluate_teacher(self) -> EvalResult | None:
        """Evaluates the teacher, where there is one and the images have labels."""
        teacher = self.setup.teacher
        if teacher is None or not self.labelled or self.setup.other_classes:
            return None
        return self.setup.evaluator.evaluate(self.emit, teacher)
