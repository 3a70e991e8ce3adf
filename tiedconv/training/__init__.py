"""Training and evaluation of any `nn.Module` that classifies images.

Nothing here knows of schemes, plans or model files, and nothing prints: progress is given as
events, results as dataclasses.
"""

from __future__ import annotations

from tiedconv.training.agreement import Agreement, answered, as_agreement
from tiedconv.training.batchnorm import has_batchnorm, recalibrate_batchnorm
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import pick_device
from tiedconv.training.engine import train
from tiedconv.training.evaluation import EvalResult, evaluate_model
from tiedconv.training.events import (
    Baseline,
    Checkpointed,
    EpochEnd,
    EvalStep,
    Event,
    OnEvent,
    Resumed,
    Skipped,
    Start,
    Step,
    Unlabelled,
)
from tiedconv.training.fading import Fading, share_left
from tiedconv.training.losses import distillation_loss, logits_of
from tiedconv.training.optim import learning_rate, parameter_groups
from tiedconv.training.results import TrainResult

__all__ = [
    "Agreement",
    "Baseline",
    "Checkpointed",
    "EpochEnd",
    "EvalResult",
    "EvalStep",
    "Event",
    "Fading",
    "OnEvent",
    "Resumed",
    "Skipped",
    "Start",
    "Step",
    "TrainConfig",
    "TrainResult",
    "Unlabelled",
    "answered",
    "as_agreement",
    "distillation_loss",
    "evaluate_model",
    "has_batchnorm",
    "learning_rate",
    "logits_of",
    "parameter_groups",
    "pick_device",
    "recalibrate_batchnorm",
    "share_left",
    "train",
]
