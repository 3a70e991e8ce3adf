"""The training loop: over unique parameters, with the original model as teacher.

A model is any `nn.Module` that gives logits. Some of its weights may be computed from others, so
the loop only ever looks at `parameters()`, `state_dict()` and the modules' types.
"""

from __future__ import annotations

import itertools
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.data import Batch, Loader
from tiedconv.data.seeds import epoch_seed, step_seed
from tiedconv.errors import TrainingError, UserError
from tiedconv.training.batchnorm import has_batchnorm, modes_kept, recalibrate_batchnorm
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement, pick_device
from tiedconv.training.ema import Ema
from tiedconv.training.evaluation import (
    EVENT_SECONDS,
    EvalResult,
    class_count,
    require_some,
    score,
)
from tiedconv.training.events import (
    Baseline,
    Checkpointed,
    EpochEnd,
    OnEvent,
    Resumed,
    Skipped,
    Start,
    Step,
    ignore,
)
from tiedconv.training.fading import Fading, check_fading, share_left
from tiedconv.training.losses import LossMeter, diverged
from tiedconv.training.objective import Objective
from tiedconv.training.optim import learning_rate, make_optimizer, set_learning_rate
from tiedconv.training.results import Progress, TrainResult
from tiedconv.training.state import identity_of, load_state, prepare_folder, save_state

READ_SECONDS = 0.5
"""The longest time that a loss stays unread on the device, if steps are slow."""

RECALIBRATION_EPOCH = -1
"""The "epoch" whose order and augmentation are used to estimate batch norm statistics."""


def train(
    model: nn.Module,
    train_data: Dataset[Any],
    val_data: Dataset[Any],
    config: TrainConfig | None = None,
    *,
    teacher: nn.Module | None = None,
    fading: Fading | None = None,
    device: str | torch.device = "auto",
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    on_event: OnEvent | None = None,
) -> TrainResult:
    """Trains a classifier in place; model and teacher are moved to the device and stay there.

    On the CPU a run that was interrupted and resumed ends with the same bits as one that was
    not. torch's global generators are left as they were.

    Args:
        model: returns logits (B, classes) in any form that `logits_of` knows.
        train_data: gives (image, label); its transform does the augmentation.
        val_data: likewise, without augmentation.
        config: the options; the defaults if None.
        teacher: a model with the same classes, whose outputs the model learns to give.
        fading: what is there at the start and faded out over the first `config.progressive` of
            the steps; evaluations are made without it.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        checkpoint_dir: where to keep `last.pt`, written after each epoch.
        resume: go on from that file; without the file, start at the beginning.
        on_event: called with each event.

    Raises:
        UserError: options, device or checkpoint that don't fit.
        DataError: no image can be read, or labels that the model has no output for.
        TrainingError: the loss is no longer a finite number.
    """
    if resume and checkpoint_dir is None:
        raise UserError("Nothing to resume from", remedy="Give the checkpoint folder as well")
    config = config or TrainConfig()
    check_fading(config, fading)
    place = pick_device(device)
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        run = _Run(model, train_data, val_data, config, teacher, place)
        run.emit = on_event or ignore
        run.fading = fading if config.progressive > 0 else None
        if checkpoint_dir is not None:
            run.checkpoint = prepare_folder(Path(checkpoint_dir))
        with modes_kept(model), closing(run.loader), closing(run.val_loader):
            try:
                return run.go(resume)
            finally:
                if run.fading is not None:
                    run.fading.set(0.0)
                run.placement.release(model, teacher)


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[Any],
        val_data: Dataset[Any],
        config: TrainConfig,
        teacher: nn.Module | None,
        device: torch.device,
    ) -> None:
        self.model, self.teacher, self.config = model, teacher, config
        size, seed, pin = config.batch_size, config.seed, device.type == "cuda"
        self.loader = Loader(
            train_data, size, shuffle=True, seed=seed, workers=config.workers, pin=pin
        )
        self.val_loader = Loader(val_data, size, seed=seed, workers=config.workers, pin=pin)
        self.classes = class_count(train_data), class_count(val_data)
        self.placement = Placement.choose(model, device, config.amp, config.channels_last)
        self.placement.place(model)
        if teacher is not None:
            self.placement.place(teacher)
            teacher.eval()
        self.objective = Objective(
            config, model, model, teacher, self.classes[0], self.placement
        )  # fmt: skip
        self.optimizer = make_optimizer(model, config)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.recalibrates = config.bn_recalibrate > 0 and has_batchnorm(model)
        self.steps = config.total_steps(len(self.loader))
        self.emit: OnEvent = ignore
        self.fading: Fading | None = None
        self.ema: Ema | None = None
        self.checkpoint: Path | None = None
        self.at = Progress()
        self.history: list[dict[str, Any]] = []
        self.broken: dict[str, None] = {}  # a set that remembers which came first

    def go(self, resume: bool) -> TrainResult:
        """Trains from the beginning or from the checkpoint to the end."""
        epochs = -(-self.steps // len(self.loader))
        self.emit(Start(self.steps, epochs, self.loader.images))
        if resume and self.checkpoint is not None and self.checkpoint.exists():
            self.begin()
            self.load(self.checkpoint)
            self.emit(Resumed(self.at.epoch, self.at.step))
        else:
            before = self.evaluate()
            self.at = replace(self.at, top1_before=before.top1, top5_before=before.top5)
            self.emit(Baseline(before.top1, before.top5, before.loss))
            # Only now: a fading may change tensors, and the baseline is the model as it came.
            self.begin()
        while self.at.step < self.steps:
            self.run_epoch()
        if self.ema is not None:
            self.ema.settle()
        return self.result()

    def begin(self) -> None:
        """Adds what is to be faded, if there is anything, and then begins to average."""
        if self.fading is not None:
            self.fading.begin()
        if self.config.ema > 0:
            self.ema = Ema(self.model, self.config.ema)

    def run_epoch(self) -> None:
        """Trains for an epoch, or what is left of the steps; evaluates and saves."""
        start = time.perf_counter()
        self.at = replace(self.at, epoch=self.at.epoch + 1)
        loss = self.train_epoch()
        due = self.config.eval_every_epoch or self.at.step >= self.steps
        evaluation = self.evaluate_trained() if due else None
        seconds = time.perf_counter() - start
        top1 = evaluation.top1 if evaluation else None
        top5 = evaluation.top5 if evaluation else None
        self.at = replace(
            self.at,
            seconds=self.at.seconds + seconds,
            best_top1=max(self.at.best_top1, -1.0 if top1 is None else top1),
        )
        end = EpochEnd(self.at.epoch, loss, top1, top5, seconds)
        self.history.append({**asdict(end), "step": self.at.step})
        self.emit(end)
        if self.checkpoint is not None:
            self.save(self.checkpoint)
            self.emit(Checkpointed(str(self.checkpoint)))

    def train_epoch(self) -> float:
        """Takes the steps of one epoch and returns their mean loss."""
        torch.manual_seed(epoch_seed(self.config.seed, self.at.epoch))  # for dropout
        self.model.train()
        meter = LossMeter(self.placement.device)
        start = read = reported = time.perf_counter()
        first_step, seen, known_broken = self.at.step, 0, len(self.broken)
        for batch in self.loader.epoch(self.at.epoch):
            self.broken.update(dict.fromkeys(batch.broken))
            if not len(batch.images):
                continue
            lr = learning_rate(self.at.step, self.steps, self.config)
            if self.fading is not None:
                self.fading.set(share_left(self.at.step, self.steps, self.config.progressive))
            meter.add(self.take_step(batch, lr))
            seen += len(batch.images)
            count = self.at.images + len(batch.images)
            self.at = replace(self.at, step=self.at.step + 1, images=count)
            now = time.perf_counter()
            last = self.at.step >= self.steps
            if meter.full or last or now - read >= READ_SECONDS:
                loss = self.read(meter)
                now = read = time.perf_counter()
                if last or now - reported >= EVENT_SECONDS:
                    reported = now
                    eta = (now - start) / (self.at.step - first_step) * (self.steps - self.at.step)
                    self.emit(Step(self.at.step, loss, lr, seen / (now - start), eta))
            if last:
                break
        require_some(seen, self.broken)
        self.read(meter)
        if len(self.broken) > known_broken:
            self.emit(Skipped(len(self.broken), next(iter(self.broken))))
        return meter.mean()

    def take_step(self, batch: Batch, lr: float) -> Tensor:
        """One update of the parameters; returns the loss, still on the device."""
        set_learning_rate(self.optimizer, lr)
        seed = step_seed(self.config.seed, self.at.step)
        loss = self.objective(batch.images, batch.labels, seed).loss
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        told = loss.detach()
        if self.config.clip > 0:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
            # 0 times a norm that isn't finite is NaN: shows bad gradients at their own step.
            told = told + 0 * norm
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return told

    def read(self, meter: LossMeter) -> float:
        """The mean of the losses since the last read; raises TrainingError if one is bad."""
        losses = meter.read()
        first = self.at.step - len(losses) + 1
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise self.diverged(step)
        return sum(losses) / max(1, len(losses))

    def diverged(self, step: int) -> TrainingError:
        """The error for a loss that is not finite."""
        saved = "There is no checkpoint to go back to"
        if self.history and self.checkpoint is not None:
            saved = f"The last good checkpoint is {self.checkpoint} (epoch {len(self.history)})"
        return diverged(step, self.steps, self.config.lr, saved)

    def evaluate_trained(self) -> EvalResult:
        """Evaluates after training, with fresh batch norm statistics, without what is faded."""
        averaged = self.ema.swapped() if self.ema is not None else nullcontext()
        with averaged, self.fading.left_out() if self.fading is not None else nullcontext():
            if self.recalibrates:
                batches = self.loader.epoch(RECALIBRATION_EPOCH)
                chosen = itertools.islice(batches, self.config.bn_recalibrate)
                recalibrate_batchnorm(self.model, chosen, self.placement)
            evaluation = self.evaluate()
        # The last update of an epoch has no later loss that would show its damage.
        if not math.isfinite(evaluation.loss):
            raise self.diverged(self.at.step)
        return evaluation

    def evaluate(self) -> EvalResult:
        """Evaluates the model as it is now."""
        result = score(self.model, self.val_loader, self.placement, self.emit, self.classes[1])
        if result.skipped > self.at.val_skipped:
            self.at = replace(self.at, val_skipped=result.skipped)
            self.emit(Skipped(result.skipped, result.example_of_skipped or ""))
        return result

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run."""
        return identity_of(
            self.config, self.loader.images, self.val_loader.images, self.teacher is not None
        )

    def save(self, path: Path) -> None:
        """Writes the checkpoint."""
        state = {
            "identity": self.identity(),
            "progress": asdict(self.at),
            "history": self.history,
            "broken": list(self.broken),
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Restores the checkpoint."""
        state = load_state(path, self.identity())
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"The checkpoint {path} is of a different model",
                "Its tensors don't fit",
                "Use the model it was made with, or start anew without --resume",
            ) from error
        self.at = Progress(**state["progress"])
        self.history = state["history"]
        self.broken = dict.fromkeys(state["broken"])

    def result(self) -> TrainResult:
        """The figures of the finished run."""
        end = self.history[-1]
        return TrainResult(
            top1_before=self.at.top1_before,
            top5_before=self.at.top5_before,
            top1=end["top1"],
            top5=end["top5"],
            loss=end["loss"],
            epochs=self.at.epoch,
            steps=self.at.step,
            images=self.at.images,
            seconds=self.at.seconds,
            skipped=len(self.broken) + self.at.val_skipped,
            history=self.history,
        )
