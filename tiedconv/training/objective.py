"""The training loss of a classifier: mixed images, labels and distillation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tiedconv.errors import UserError
from tiedconv.training.blocks import Blocks
from tiedconv.training.config import TrainConfig
from tiedconv.training.device import Placement
from tiedconv.training.evaluation import check_labels
from tiedconv.training.losses import feature_loss, logits_of, training_loss
from tiedconv.training.mixup import Mix


class Outcome(NamedTuple):
    """What an objective gives for a batch.

    Attributes:
        loss: a number to call `backward` on, float32, on the device.
        logits: of the model for the images as it saw them, (B, classes), float32.
    """

    loss: Tensor
    logits: Tensor


class Loss(Protocol):
    """What `TrainStep` calls: images (B, C, H, W), what stands beside them (B,), and a seed."""

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> Outcome: ...


class Objective:
    """The loss of a model on a batch, made once for a training.

    Args:
        config: the options.
        forward: runs the model on images (B, C, H, W) on the device: the model itself or what
            wraps it.
        student: the model itself, on its device; its blocks are what features are taken from.
        teacher: in evaluation mode and on the same device, or None. It runs without gradients
            and under the same autocast: in bfloat16 on CUDA, unless that is off.
        classes: of the data, where they are known; a model with fewer outputs is refused.
        placement: where and in which layout and precision to compute.

    Raises:
        UserError: options that need a teacher where there is none, or a teacher with other
            blocks than the model where features are asked for.
    """

    def __init__(
        self,
        config: TrainConfig,
        forward: Callable[[Tensor], Any],
        student: nn.Module,
        teacher: nn.Module | None,
        classes: int | None,
        placement: Placement,
    ) -> None:
        self.config = config
        self._forward, self._student, self._teacher = forward, student, teacher
        self._classes, self._placement = classes, placement
        self._checked = False
        self._blocks = distilled_blocks(config, student, teacher)

    def __call__(self, images: Tensor, labels: Tensor, seed: int) -> Outcome:
        """The loss of a batch.

        Args:
            images: (B, C, H, W), on any device.
            labels: (B,), on the CPU.
            seed: decides how the images are mixed.

        Raises:
            DataError: a label that the model has no output for.
            UserError: a teacher with other classes or widths.
        """
        shown = self._placement.images(images)
        mix: Mix | None = None
        if self.config.mixup > 0 or self.config.cutmix > 0:
            mix = Mix.draw(self.config.mixup, self.config.cutmix, images.shape, seed)
            shown = self._placement.images(mix.images(shown))
        with outputs_of(self._student, self._blocks) as own, self._placement.autocast():
            logits = logits_of(self._forward(shown))
        self._check_labels(labels, logits.shape[-1])
        wanted = labels.to(self._placement.device, non_blocking=True)
        if mix is not None:
            wanted = mix.labels(wanted, logits.shape[-1])
        target, aims = self._taught(shown)
        loss = training_loss(logits, wanted, target, self.config)
        if aims:
            loss = loss + self.config.features * feature_loss(own, aims)
        return Outcome(loss, logits)

    def _taught(self, images: Tensor) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The teacher's logits, None where they have no weight, and its blocks' outputs."""
        distills = self.config.distill_weight > 0
        if self._teacher is None or not (distills or self._blocks):
            return None, {}
        with (
            torch.no_grad(),
            outputs_of(self._teacher, self._blocks) as aims,
            self._placement.autocast(),
        ):
            logits = logits_of(self._teacher(images))
        return logits if distills else None, aims

    def _check_labels(self, labels: Tensor, outputs: int) -> None:
        if not self._checked or labels.max() >= outputs:
            check_labels(labels, outputs, self._classes)
        self._checked = True


def distilled_blocks(
    config: TrainConfig, student: nn.Module, teacher: nn.Module | None
) -> tuple[str, ...]:
    """The names of the blocks whose outputs are distilled; none unless features are asked for.

    Raises:
        UserError: options that need a teacher where there is none, or a teacher with other blocks.
    """
    check_teacher(config, teacher)
    if config.features > 0 and teacher is not None:
        return common_blocks(student, teacher)
    return ()


def common_blocks(student: nn.Module, teacher: nn.Module) -> tuple[str, ...]:
    """The names of the blocks, which student and teacher must share.

    Raises:
        UserError: the student has no numbered blocks, or the teacher has others.
    """
    own, others = Blocks.of(student).names, Blocks.of(teacher).names
    if not own:
        raise UserError(
            "Features are distilled, but the model has no numbered blocks",
            "There is nothing to compare with the teacher",
            "Leave --features out",
            code="no-numbered-blocks",
        )
    if set(own) != set(others):
        odd = next(n for n in (*own, *others) if (n in own) != (n in others))
        raise UserError(
            f"Features are distilled, but the model has {len(own)} blocks, the teacher "
            f"{len(others)}, and only one of them has {odd}",
            "There is nothing to compare it with",
            "Choose a teacher of the same architecture, such as --teacher auto, or leave "
            "--features out",
            code="teacher-mismatch",
        )
    return own


def check_teacher(config: TrainConfig, teacher: nn.Module | None) -> None:
    """Raises UserError for options that would do nothing without a teacher."""
    if teacher is not None:
        return
    option = (
        f"features is {config.features:g}" if config.features > 0
        else "distillation is hard" if config.distillation == "hard" else None
    )  # fmt: skip
    if option:
        raise UserError(
            f"The training option {option}, but there is no teacher",
            "There is nothing to distil",
            "Give a teacher, or leave the option out",
            code="teacher-missing",
        )


@contextmanager
def outputs_of(model: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these blocks give while the context lasts: name to output, filled by each forward."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                found[name] = tensor

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(output: Any) -> Tensor | None:
    """The first tensor in what a module returns: a tensor, or nested tuples, lists and dicts."""
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    if isinstance(output, dict | tuple | list):
        for part in parts:
            found = first_tensor(part)
            if found is not None:
                return found
    return None
