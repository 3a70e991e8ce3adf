"""The state of a training run: how far it is, and the checkpoints it continues from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiedconv.errors import TrainingError, UserError
from tiedconv.training.best_state import BestState
from tiedconv.training.blend import Blend
from tiedconv.training.distributed import PaddingImage
from tiedconv.training.ema import Ema
from tiedconv.training.events import Checkpointed, EvalStep, Event, OnEvent, ignore
from tiedconv.training.losses import diverged
from tiedconv.training.metrics import AGREEMENT, SIMILARITY, metric_names
from tiedconv.training.results import Progress, TrainResult
from tiedconv.training.signals import Interrupted, Interrupts
from tiedconv.training.state import StateFolder, identity_of
from tiedconv.training.trainer import TrainerSetup


class RunState:
    """What a run knows of itself; a checkpoint holds all that changes."""

    def __init__(self, setup: TrainerSetup) -> None:
        self.setup, self.config, self.processes = setup, setup.config, setup.processes
        self.loader, self.updater, self.learner = setup.loader, setup.updater, setup.learner
        self.model, self.placement = setup.model, setup.placement
        self.steps = self.config.total_steps(len(self.loader))
        self.listener: OnEvent = ignore
        self.blend: Blend | None = None
        self.ema: Ema | None = None
        self.best: BestState | None = None
        self.checks: frozenset[int] = frozenset()
        self.metrics = metric_names(setup.val_data)
        self.folder: StateFolder | None = None
        self.interrupts = Interrupts()
        self.at = Progress()
        self.history: list[dict[str, Any]] = []
        self.broken: dict[str, None] = {}  # a set that remembers which came first
        self.spare = PaddingImage(self.processes)
        self.made_of: Mapping[str, str] = {}
        self.started = self.saved = time.monotonic()

    def diverged(self, step: int) -> TrainingError:
        """The error for a loss that is not finite."""
        files = self.folder.files() if self.folder is not None else []
        saved = "There is no checkpoint"
        if files:
            saved = f"The last good checkpoint is {files[-1]} (step {int(files[-1].stem[5:])})"
        return diverged(step, self.steps, self.at.lr, saved)

    def emit(self, event: Event) -> None:
        """Reports an event; interrupts a long evaluation on a signal."""
        alone = not self.processes.several
        if isinstance(event, EvalStep) and self.interrupts.asked is not None and alone:
            raise Interrupted(self.interrupts.asked)
        self.listener(event)

    @property
    def labelled(self) -> bool:
        """Whether the labels are the data's own, not the teacher's."""
        return self.metrics not in (AGREEMENT, SIMILARITY)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with this run."""
        return identity_of(
            self.config, self.loader.images, self.setup.val_loader.images,
            self.setup.teacher is not None, self.labelled,
            # Another number of processes adds up gradients in another order.
            {**self.made_of, "processes": str(self.processes.count)},
        )  # fmt: skip

    def save(self) -> None:
        """Writes a checkpoint, if there is a folder."""
        if self.folder is None:
            return
        state = {
            "identity": self.identity(),
            "steps": self.steps,
            "progress": asdict(self.at),
            "history": self.history,
            "broken": list(self.broken),
            "scaler": self.updater.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "best": self.best.state_dict() if self.best is not None else None,
            **self.learner.state(self.setup.optimizer),
        }
        folder = self.folder
        self.processes.run_on_rank0(
            lambda: self.emit(Checkpointed(str(folder.save(self.at.step, state)), self.at.step)),
            self.placement.device,
        )
        self.saved = time.monotonic()

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Restores a checkpoint."""
        try:
            self.learner.load(state, self.setup.optimizer)
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            if self.best is not None:
                self.best.load_state_dict(state["best"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The checkpoint {path} is of a different model",
                "Its tensors don't fit",
                "Use the same model, or pass --force without --resume to restart",
                code="checkpoint-mismatch",
            ) from error
        self.updater.scaler.load_state_dict(state["scaler"])
        self.at = Progress(**state["progress"])
        self.steps = state["steps"]
        self.history = state["history"]
        self.broken = dict.fromkeys(state["broken"])

    def result(self) -> TrainResult:
        """The figures of the finished run."""
        skipped = len(self.broken) + self.at.val_skipped
        return TrainResult.of(self.at, self.history, skipped, self.config.batch_size)
