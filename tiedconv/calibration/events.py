"""Events of block-wise calibration, and its result.

Errors are relative Frobenius errors of outputs: 0 is exact, 1 is as bad as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Fitting:
    """A span is being fitted; sent at most ten times a second.

    Attributes:
        units: names of the span's modules; "" is the whole model.
        index: which span of the pass, from 0.
        count: spans in a pass.
        pass_index: which pass, from 0.
        step: steps done.
        steps: steps in all.
        error: of the last few steps, on the images that are fitted.
    """

    units: tuple[str, ...]
    index: int
    count: int
    pass_index: int
    step: int
    steps: int
    error: float


@dataclass(frozen=True)
class Fitted:
    """A span is done (and saved); the errors are those on held-out images."""

    units: tuple[str, ...]
    index: int
    count: int
    pass_index: int
    before: float
    after: float


@dataclass(frozen=True)
class Joint:
    """The whole model is being fitted; `loss` is that of the last few steps."""

    step: int
    steps: int
    loss: float


CalibEvent = Fitting | Fitted | Joint

OnCalibEvent = Callable[[CalibEvent], None]


def ignore(event: CalibEvent) -> None:
    """No-op callback."""


@dataclass(frozen=True)
class SpanResult:
    """The errors of one span, over all passes.

    Attributes:
        units: names of its modules; "" is the whole model.
        before: error on held-out images before its first fit.
        after: error on held-out images after its last fit.
    """

    units: tuple[str, ...]
    before: float
    after: float


@dataclass(frozen=True)
class BlockwiseResult:
    """What a calibration did.

    Attributes:
        spans: in order of execution; empty if the effort is "fast".
        kl_before: KL(teacher || student) of the outputs on held-out images, in nats.
        kl_after: likewise, at the end.
        gained: whether the distance that decides between states is smaller than at the start; it is
            of the same images and of shifted copies, of which chance says less.
        images: number of images used, the held-out ones among them.
        held_out: number of held-out images.
        skipped: number of images that could not be read.
        example_of_skipped: the first of them, or None.
        seconds: time taken, over all resumed parts.
        held_batches: the held-out images, in batches of one shape.
    """

    spans: tuple[SpanResult, ...]
    kl_before: float
    kl_after: float
    gained: bool
    images: int
    held_out: int
    skipped: int
    example_of_skipped: str | None
    seconds: float
    held_batches: tuple[Tensor, ...] = field(repr=False, compare=False)
