"""How to calibrate: one frozen record, checked when it is made."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from tiedconv.training.option_checks import check_choice, check_range


@dataclass(frozen=True)
class Effort:
    """What an effort means: epochs over the calibration images, bounded in steps.

    Attributes:
        passes: over all spans.
        epochs: over the images, for each span.
        least: minimum of steps for each span.
        most: maximum of steps for each span.
        joint_epochs: over the images, for the whole model at the end; 0 for none.
        joint_most: maximum of steps for the whole model.
    """

    passes: int
    epochs: int
    least: int
    most: int
    joint_epochs: int
    joint_most: int


EFFORTS = {
    "fast": Effort(0, 0, 0, 0, 0, 0),
    "normal": Effort(1, 6, 50, 300, 30, 900),
    "thorough": Effort(1, 6, 50, 300, 80, 3000),
}


@dataclass(frozen=True)
class CalibConfig:
    """The options of `fit_blocks`.

    Attributes:
        effort: "fast" only re-estimates the statistics of batch norms; "normal" fits block by
            block, in minutes; "thorough" fits the whole model for longer.
        batch_size: images in a step.
        lr: the highest learning rate of a fit, relative to a tensor's root mean square, so
            that a step changes each entry by about that fraction.
        joint_lr: likewise, for the whole model at the end; less where its outputs are near
            already.
        passes: over all spans; None leaves it to the effort, likewise below.
        steps: for each span.
        joint_steps: for the whole model at the end; 0 for none.
        augment: whether the whole model is fitted to mirrored and shifted images, not only to
            images as they are. What the original answers for them is known.
        clip: largest norm of the gradient; 0 for no clipping.
        seed: decides the order of images, and which are held out.
        cache_bytes: activations and images kept in memory at most; the rest goes to
            temporary files.
        amp: "auto" for bfloat16 autocast on CUDA, or "off".

    Raises:
        UserError: a value out of range.
    """

    effort: str = "normal"
    batch_size: int = 64
    lr: float = 0.02
    joint_lr: float = 0.006
    passes: int | None = None
    steps: int | None = None
    joint_steps: int | None = None
    augment: bool = True
    clip: float = 1.0
    seed: int = 0
    cache_bytes: int = 2 * 2**30
    amp: str = "auto"

    def __post_init__(self) -> None:
        check_choice("calibration", "effort", self.effort, tuple(EFFORTS))
        check_choice("calibration", "amp", self.amp, ("auto", "off"))
        check = functools.partial(check_range, "calibration")
        check("batch_size", self.batch_size, 1)
        for name in ("lr", "joint_lr"):
            check(name, getattr(self, name), open_low=True)
        for name in ("clip", "seed", "cache_bytes"):
            check(name, getattr(self, name))
        for name in ("passes", "steps", "joint_steps"):
            if getattr(self, name) is not None:
                check(name, getattr(self, name))

    @property
    def total_passes(self) -> int:
        """Passes over all spans."""
        if self.steps == 0:
            return 0
        return EFFORTS[self.effort].passes if self.passes is None else self.passes

    @property
    def fits(self) -> bool:
        """Whether anything is fitted, beyond the statistics of batch norms."""
        return self.total_passes > 0 or self.total_joint_steps(1) > 0

    def span_steps(self, images: int) -> int:
        """Steps for each span, given the number of images that are fitted."""
        if self.steps is not None:
            return self.steps
        # Passes asked for with the effort "fast" take the steps of "normal".
        effort = EFFORTS[self.effort] if EFFORTS[self.effort].passes else EFFORTS["normal"]
        return min(max(effort.epochs * self._batches(images), effort.least), effort.most)

    def total_joint_steps(self, images: int) -> int:
        """Steps for the whole model, given the number of images that are fitted."""
        if self.joint_steps is not None:
            return self.joint_steps
        effort = EFFORTS[self.effort]
        return min(effort.joint_epochs * self._batches(images), effort.joint_most)

    def _batches(self, images: int) -> int:
        return -(-images // self.batch_size)
