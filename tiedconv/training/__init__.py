"""Training and evaluation of any `nn.Module` that classifies images.

Nothing here knows of schemes, plans or model files, and nothing prints: progress is given as
events, results as dataclasses.
"""

from __future__ import annotations

from tiedconv.training.agreement import Agreement, answered, as_agreement
from tiedconv.training.batching import find_batch_size
from tiedconv.training.batchnorm import has_batchnorm, recalibrate_batchnorm
from tiedconv.training.blocks import Blocks
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import pick_device
from tiedconv.training.ema import Ema
from tiedconv.training.engine import train
from tiedconv.training.evaluation import EvalResult, evaluate_model
from tiedconv.training.events import (
    Baseline,
    Checkpointed,
    Detecting,
    EpochEnd,
    EvalStep,
    Event,
    FewClasses,
    NotCompiled,
    OnEvent,
    Resumed,
    Skipped,
    Start,
    Step,
    TeacherScore,
    Unlabelled,
)
from tiedconv.training.fading import Fading, share_left
from tiedconv.training.forecast import Forecast, forecast
from tiedconv.training.interrupts import Interrupted, ended_as_by_hand
from tiedconv.training.losses import (
    distillation_loss,
    feature_loss,
    hard_distillation_loss,
    logits_of,
)
from tiedconv.training.measures import ACCURACY, AGREEMENT, PRECISION, Measure
from tiedconv.training.mixing import Mix
from tiedconv.training.objective import Objective, Outcome
from tiedconv.training.optim import learning_rate, parameter_groups
from tiedconv.training.pace import Pace
from tiedconv.training.processes import Processes, joined, rank_in_environment
from tiedconv.training.results import TrainResult
from tiedconv.training.state import FREE_TO_CHANGE, StateFolder
from tiedconv.training.teacher import fit_inputs

__all__ = [
    "ACCURACY",
    "AGREEMENT",
    "FREE_TO_CHANGE",
    "PRECISION",
    "Agreement",
    "Baseline",
    "Blocks",
    "Checkpointed",
    "Detecting",
    "Ema",
    "EpochEnd",
    "EvalResult",
    "EvalStep",
    "Event",
    "Fading",
    "FewClasses",
    "Forecast",
    "Interrupted",
    "Measure",
    "Mix",
    "NotCompiled",
    "Objective",
    "OnEvent",
    "Outcome",
    "Pace",
    "Processes",
    "Resumed",
    "Skipped",
    "Start",
    "StateFolder",
    "Step",
    "TeacherScore",
    "TrainConfig",
    "TrainResult",
    "Unlabelled",
    "answered",
    "as_agreement",
    "distillation_loss",
    "ended_as_by_hand",
    "evaluate_model",
    "feature_loss",
    "find_batch_size",
    "fit_inputs",
    "forecast",
    "hard_distillation_loss",
    "has_batchnorm",
    "joined",
    "learning_rate",
    "logits_of",
    "parameter_groups",
    "pick_device",
    "rank_in_environment",
    "recalibrate_batchnorm",
    "share_left",
    "train",
]
