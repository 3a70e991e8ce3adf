"""The options of a training, validated on construction."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tiedconv.data import AUGMENTS
from tiedconv.errors import UserError
from tiedconv.training.device import AMPS
from tiedconv.training.option_checks import check_choice, check_range

USUAL_LR = {"adamw": 5e-4, "sgd": 0.05}
"""The largest learning rate of each optimiser that is taken where none is given."""

OPTIMIZERS = ("adamw", "sgd")
SHARDINGS = ("ddp", "fsdp")

DISTILLATIONS = ("soft", "hard")
"""Targets of the distillation: the teacher's probabilities, or its predicted class."""

_POSITIVE = ("temperature",)
_FRACTIONS = ("warmup", "min_lr", "distill_weight", "label_smoothing", "progressive", "erasing")
_NOT_NEGATIVE = (
    "batch_size", "weight_decay", "clip", "bn_recalibrate", "features", "mixup", "cutmix",
    "checkpoint_minutes",
)  # fmt: skip
_CHOICES = {
    "optimizer": OPTIMIZERS,
    "distillation": DISTILLATIONS,
    "augment": AUGMENTS,
    "amp": AMPS,
    "sharding": SHARDINGS,
    "channels_last": ("auto", "on", "off"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The options of `train`.

    Attributes:
        epochs: passes over the training images; may be fractional.
        steps: number of optimiser steps, instead of epochs.
        batch_size: images per step, over all processes; 0 to find a size that fits and is fast.
        lr: the peak learning rate; None to find one for the model and the data (`lr_range`).
        only: patterns, such as `*decoder*` and `tied/*`, of the names of the parameters that are
            trained; empty for all.
        optimizer: "adamw" or "sgd" (Nesterov momentum 0.9).
        weight_decay: for weights with two or more dimensions, except embeddings of positions and
            tokens, and scales.
        layer_decay: layer-wise decay: factor of the learning rate for each block further from the
            output; 1 disables.
        warmup: fraction of the steps in which the learning rate rises linearly to `lr`.
        min_lr: learning rate of the last step, as a fraction of `lr`, after a cosine decay.
        distillation: "soft" for the teacher's probabilities, "hard" for its predicted class.
        temperature: divides the logits of teacher and student in soft distillation.
        distill_weight: weight of the distillation in the loss, 0 to 1, when there is a teacher.
        features: weight of the feature distillation: the distance of the outputs of the blocks to
            those of the teacher's blocks of the same names; 0 for none.
        label_smoothing: fraction of the label spread over all classes.
        clip: maximum norm of the gradient; 0 for no clipping.
        ema: decay of the exponential moving average of the weights, such as 0.999; the EMA weights
            are evaluated and saved. 0 for none, less than 1.
        augment: augmentation of the training images; for whoever makes the data set.
        erasing: probability of random erasing; for whoever makes the data set.
        mixup: alpha of MixUp, such as 0.8; 0 for none.
        cutmix: alpha of CutMix, such as 1; 0 for none. With both, each step takes one of the two.
        progressive: fraction of the steps over which the original weights are annealed to the
            compact ones, along half a cosine; 0 for none. Needs a `Blend`, which
            `tiedconv.finetune` makes.
        bn_recalibrate: training batches from which BatchNorm statistics are re-estimated before an
            evaluation; 0 to leave the running averages.
        amp: precision of autocast: "bf16", "fp16" (with a gradient scaler), "off", or "auto": on
            CUDA the first of these that the GPU supports.
        channels_last: "auto" for convolutional networks, "on" or "off".
        seed: decides order, augmentation and dropout.
        keep_best: end with the state whose loss on held-out images was lowest, which may be the
            start; with a teacher and a distillation weight of 1 the loss is the distance to it.
            Looked at eight times on the way and after each epoch that is evaluated.
        eval_every_epoch: evaluate after each epoch, not only before and at the end.
        workers: processes that read images; None chooses.
        accumulate: gradient-accumulation micro-batches per step.
        sharding: "ddp" replicates the model in each process, "fsdp" shards it.
        compile: whether to use `torch.compile`.
        checkpoint_minutes: time between two checkpoints within an epoch.
        keep: number of checkpoints to keep.
        time_budget: seconds that the whole run may take, instead of epochs and steps; the number
            of steps follows from the measured throughput.

    Raises:
        UserError: a value out of range.
    """

    epochs: float | None = 1
    steps: int | None = None
    batch_size: int = 64
    lr: float | None = None
    only: tuple[str, ...] = ()
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    warmup: float = 0.05
    min_lr: float = 0.01
    distillation: str = "soft"
    temperature: float = 2.0
    distill_weight: float = 0.5
    features: float = 0.0
    label_smoothing: float = 0.0
    clip: float = 1.0
    ema: float = 0.0
    augment: str = "crop"
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    progressive: float = 0.0
    bn_recalibrate: int = 20
    amp: str = "auto"
    channels_last: str = "auto"
    seed: int = 0
    keep_best: bool = True
    eval_every_epoch: bool = True
    workers: int | None = None
    accumulate: int = 1
    sharding: str = "ddp"
    compile: bool = False
    checkpoint_minutes: float = 10.0
    keep: int = 2
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None and self.time_budget is None:
            raise UserError(
                "None of epochs, steps and time_budget is given",
                hint="Give one of them",
                code="length-missing",
            )
        check = functools.partial(check_range, "training")
        if self.time_budget is not None:
            check("time_budget", self.time_budget, open_low=True)
        if self.epochs is not None and self.steps is None:
            check("epochs", self.epochs, open_low=True)
        if self.steps is not None:
            check("steps", self.steps, 1)
        if self.workers is not None:
            check("workers", self.workers)
        if self.lr is not None:
            check("lr", self.lr, open_low=True)
        for name in _POSITIVE:
            check(name, getattr(self, name), open_low=True)
        for name in _FRACTIONS:
            check(name, getattr(self, name), 0, 1)
        for name in _NOT_NEGATIVE:
            check(name, getattr(self, name))
        for name in ("accumulate", "keep"):
            check(name, getattr(self, name), 1)
        check("layer_decay", self.layer_decay, 0, 1, open_low=True)
        check("ema", self.ema, 0, 1, open_high=True)
        check("seed", self.seed, -(2**63), 2**63 - 1)
        for name, choices in _CHOICES.items():
            check_choice("training", name, getattr(self, name), choices)
        if self.sharding == "fsdp" and (self.progressive > 0 or self.amp == "fp16"):
            option = "progressive" if self.progressive > 0 else "fp16"
            raise UserError(
                f"The training options sharding=fsdp and {option} were both given",
                "They can't be combined",
                "Use sharding=ddp, or leave the other out",
                code="options-conflict",
            )

    @property
    def peak_lr(self) -> float:
        """The learning rate that was given, or the usual one while none was found."""
        return USUAL_LR[self.optimizer] if self.lr is None else self.lr

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps in all, at least one; one epoch's while a time budget is unmeasured."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, round(epochs * steps_per_epoch))
