"""Training and evaluation of any `nn.Module` that classifies images.

Nothing here knows of schemes, plans or model files, and nothing prints: progress is given as
events, results as dataclasses.
"""

from __future__ import annotations

from tiedconv.training.batching import find_batch_size
from tiedconv.training.batchnorm import has_batchnorm, recalibrate_batchnorm
from tiedconv.training.blend import Blend, blend_weight
from tiedconv.training.blocks import Blocks
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import pick_device
from tiedconv.training.distributed import DistContext, init_distributed, rank_in_environment
from tiedconv.training.dry_run import Forecast, forecast
from tiedconv.training.ema import Ema
from tiedconv.training.engine import train
from tiedconv.training.evaluation import EvalResult, evaluate_model
from tiedconv.training.events import (
    Baseline,
    Checkpointed,
    ClassesMatched,
    Detecting,
    EpochEnd,
    EvalStep,
    Event,
    ImagesPrepared,
    KeptBest,
    NotCompiled,
    OnEvent,
    RateFound,
    Resumed,
    Skipped,
    Start,
    Step,
    TeacherScore,
    Unlabelled,
)
from tiedconv.training.losses import (
    distillation_loss,
    feature_loss,
    hard_distillation_loss,
    logits_of,
)
from tiedconv.training.metrics import (
    ACCURACY,
    AGREEMENT,
    METRIC_TITLES,
    Metrics,
    metric_names,
    primary,
)
from tiedconv.training.mixup import Mix
from tiedconv.training.objective import Objective, Outcome
from tiedconv.training.optim import learning_rate, parameter_groups
from tiedconv.training.pseudo_labels import with_teacher_labels
from tiedconv.training.results import TrainResult
from tiedconv.training.signals import Interrupted, sigterm_as_keyboard_interrupt
from tiedconv.training.state import FREE_TO_CHANGE, StateFolder
from tiedconv.training.teacher import fit_inputs
from tiedconv.training.throughput import Throughput

__all__ = [
    "ACCURACY",
    "AGREEMENT",
    "FREE_TO_CHANGE",
    "METRIC_TITLES",
    "Baseline",
    "Blend",
    "Blocks",
    "Checkpointed",
    "ClassesMatched",
    "Detecting",
    "DistContext",
    "Ema",
    "EpochEnd",
    "EvalResult",
    "EvalStep",
    "Event",
    "Forecast",
    "ImagesPrepared",
    "Interrupted",
    "KeptBest",
    "Metrics",
    "Mix",
    "NotCompiled",
    "Objective",
    "OnEvent",
    "Outcome",
    "RateFound",
    "Resumed",
    "Skipped",
    "Start",
    "StateFolder",
    "Step",
    "TeacherScore",
    "Throughput",
    "TrainConfig",
    "TrainResult",
    "Unlabelled",
    "blend_weight",
    "distillation_loss",
    "evaluate_model",
    "feature_loss",
    "find_batch_size",
    "fit_inputs",
    "forecast",
    "hard_distillation_loss",
    "has_batchnorm",
    "init_distributed",
    "learning_rate",
    "logits_of",
    "metric_names",
    "parameter_groups",
    "pick_device",
    "primary",
    "rank_in_environment",
    "recalibrate_batchnorm",
    "sigterm_as_keyboard_interrupt",
    "train",
    "with_teacher_labels",
]
