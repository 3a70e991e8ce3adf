"""How to train: one frozen record, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tiedconv.data import AUGMENTS
from tiedconv.errors import UserError
from tiedconv.training.device import AMPS

OPTIMIZERS = ("adamw", "sgd")
SHARDINGS = ("ddp", "fsdp")

DISTILLATIONS = ("soft", "hard")
"""What a teacher teaches: its whole answer, or the class it would name."""

_SHARES = ("warmup", "min_lr", "distill_weight", "label_smoothing", "progressive", "erasing")


@dataclass(frozen=True)
class TrainConfig:
    """The options of `train`.

    Attributes:
        epochs: passes over the training images; a fraction is allowed.
        steps: exactly so many optimiser steps instead, however many epochs that takes.
        batch_size: images in a step, over all processes; 0 to find a size that fits and is fast.
        lr: the highest learning rate.
        only: patterns, such as `*decoder*` and `tied/*`, of the names of the parameters that are
            trained; empty for all.
        optimizer: "adamw" or "sgd" (Nesterov momentum 0.9).
        weight_decay: for weights with two or more dimensions, but not for embeddings of
            positions and tokens, nor for scales.
        layer_decay: what the learning rate is multiplied by for each block further from the
            output; 1 for the same rate everywhere.
        warmup: share of the steps in which the rate rises linearly to `lr`.
        min_lr: the rate of the last step, as a share of `lr`; the way there is half a cosine.
        distillation: "soft" to learn the teacher's probabilities, or "hard" to learn the class
            that it names.
        temperature: divides the logits of teacher and student in soft distillation.
        distill_weight: share of the distillation in the loss, when there is a teacher.
        features: what is added to the loss, times how far the outputs of the blocks are from
            those of the teacher's blocks of the same names; 0 for none.
        label_smoothing: share of the label spread over all classes.
        clip: largest norm of the gradient; 0 for no clipping.
        ema: decay of the moving average of the weights, which is then what is evaluated and
            kept, such as 0.999; 0 for none.
        augment: what to do to training images; for whoever makes the data set.
        erasing: probability of erasing a part of an image; for whoever makes the data set.
        mixup: alpha of MixUp, which blends pairs of images, such as 0.8; 0 for none.
        cutmix: alpha of CutMix, which cuts from one image into another, such as 1; 0 for none.
            With both, each step takes one of the two.
        progressive: share of the steps over which the original is faded into the compact model,
            along half a cosine; 0 for none. Needs a `Blend`, which `tiedconv.finetune` makes.
        bn_recalibrate: training batches from which to estimate the statistics of batch norms
            before an evaluation; 0 to leave the running averages as they are.
        amp: number format of autocast: "bf16", "fp16" (with a scale for the gradients), "off", or
            "auto": on CUDA the first of these that the card can do.
        channels_last: "auto" for convolutional networks, "on" or "off".
        seed: decides order, augmentation and dropout.
        eval_every_epoch: evaluate after each epoch, not only before and at the end.
        workers: processes that read images; None chooses.
        accumulate: parts in which a step's images are passed through the model, for memory.
        sharding: what several processes have of the model: "ddp" all of it, "fsdp" a part each.
        compile: whether to let `torch.compile` make the training step.
        checkpoint_minutes: time between two checkpoints within an epoch.
        keep: checkpoints that are kept.
        time_budget: seconds that the whole run may take; the steps follow from how fast the
            first ones are. Instead of epochs and steps.

    Raises:
        UserError: a value out of range.
    """

    epochs: float | None = 1
    steps: int | None = None
    batch_size: int = 64
    lr: float = 5e-4
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
            raise UserError("Neither epochs nor steps are given", hint="Give one of them")
        if self.time_budget is not None:
            _between("time_budget", self.time_budget, 0, math.inf, open_low=True)
        if self.epochs is not None and self.steps is None:
            _between("epochs", self.epochs, 0, math.inf, open_low=True)
        if self.steps is not None:
            _between("steps", self.steps, 1, math.inf)
        _between("batch_size", self.batch_size, 0, math.inf)
        _between("lr", self.lr, 0, math.inf, open_low=True)
        _between("temperature", self.temperature, 0, math.inf, open_low=True)
        for name in _SHARES:
            _between(name, getattr(self, name), 0, 1)
        for name in ("accumulate", "keep"):
            _between(name, getattr(self, name), 1, math.inf)
        for name in (
            "weight_decay", "clip", "bn_recalibrate", "features", "mixup", "cutmix",
            "checkpoint_minutes",
        ):  # fmt: skip
            _between(name, getattr(self, name), 0, math.inf)
        _between("layer_decay", self.layer_decay, 0, 1, open_low=True)
        if not 0 <= self.ema < 1:
            raise UserError(
                f"The training option ema is {self.ema}",
                "At 1 the average would stay at the weights of the start" if self.ema == 1 else "",
                "Choose 0 or more and less than 1",
            )
        if self.workers is not None:
            _between("workers", self.workers, 0, math.inf)
        _between("seed", self.seed, -(2**63), 2**63 - 1)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("distillation", self.distillation, DISTILLATIONS)
        _one_of("augment", self.augment, AUGMENTS)
        _one_of("amp", self.amp, AMPS)
        _one_of("sharding", self.sharding, SHARDINGS)
        if self.sharding == "fsdp" and (self.progressive > 0 or self.amp == "fp16"):
            option = "progressive" if self.progressive > 0 else "fp16"
            raise UserError(
                f"The training options sharding=fsdp and {option} were both given",
                "They can't be done together",
                "Use sharding=ddp, or leave the other out",
            )
        _one_of("channels_last", self.channels_last, ("auto", "on", "off"))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps in all, at least one; one epoch's while a time budget is unmeasured."""
        if self.steps is not None:
            return self.steps
        epochs = 1.0 if self.epochs is None else self.epochs
        return max(1, round(epochs * steps_per_epoch))


def _between(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    # Written so that NaN fails too.
    if (low < value if open_low else low <= value) and value <= high and value != math.inf:
        return
    rule = f"more than {low:g}" if open_low else f"{low:g} or more"
    bound = "" if high == math.inf else f" and at most {high:g}"
    raise UserError(f"The training option {name} is {value}", hint=f"Choose {rule}{bound}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(
            f"The training option {name} is {value!r}",
            hint=f"Choose one of {', '.join(allowed)}",
        )
