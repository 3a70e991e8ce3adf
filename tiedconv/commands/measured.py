"""What was measured of a compact model, as its file's history records it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiedconv.training import METRIC_TITLES
from tiedconv.utils.figures import accuracy, counted, percent

ROUND_OFF = 1e-5
"""By which the mean cosine of equal features may exceed 1, in float32."""


@dataclass(frozen=True)
class Measured:
    """A figure, and what it was measured on.

    Args:
        step: number of the step in the history, from 1.
        kind: of figure, by which those of two files are compared: `top1`, or of an agreement
            what was compared, such as `same prediction`.
        title: the same for people.
        value: at the end of the step.
        counts: whether it is a share of cases, 0 to 1, rather than a similarity.
        images: how many it was measured on.
        data: their name; "" for held-out calibration images.
        random: whether they were drawn at random, without a photo.
        before: at the beginning of the step; None if not measured.
        teacher: of the teacher of a fine-tuning; None if not measured.
    """

    step: int
    kind: str
    title: str
    value: float
    counts: bool
    images: int
    data: str = ""
    random: bool = False
    before: float | None = None
    teacher: float | None = None

    @property
    def text(self) -> str:
        """The figure."""
        return self.written(self.value)

    def written(self, value: float | None) -> str:
        """A figure of this kind."""
        if value is None or not self.counts:
            return "" if value is None else f"{value:.4f}"
        return accuracy(value) if self.data else percent(value)

    @property
    def sentence(self) -> str:
        """In words, with what it was measured on."""
        if not self.data:
            images = counted(self.images, f"held-out {'random ' if self.random else ''}image")
            if self.counts:
                return f"The {self.title} as the original on {self.text} of {images}."
            return f"Mean {self.title} to the original's: {self.text}, on {images}."
        beside = ", ".join(
            f"{words} {self.written(value)}"
            for words, value in (("before the training", self.before), ("teacher", self.teacher))
            if value is not None
        )
        title = self.title[:1].upper() + self.title[1:]
        images = counted(self.images, "image")
        return f"{title} {self.text}{f' ({beside})' if beside else ''} on {images} of {self.data}."


def measured(history: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    """All that the steps of a history measured, oldest first; what is malformed is left out."""
    return tuple(
        found for number, entry in enumerate(history, 1) for found in _of_step(number, entry)
    )


def _of_step(number: int, entry: Mapping[str, Any]) -> Iterator[Measured]:
    if (found := _agreement(number, entry)) is not None:
        yield found
    if entry.get("step") != "finetune":
        return
    for name, title in METRIC_TITLES.items():
        value = fraction(entry.get(name))
        if value is not None:
            yield Measured(
                number, name, title, value, name != "similarity", int(entry["val_images"]),
                str(entry.get("data") or "unnamed data"), False,
                fraction(entry.get(f"{name}_before")), fraction(entry.get(f"{name}_teacher")),
            )  # fmt: skip


def _agreement(number: int, entry: Mapping[str, Any]) -> Measured | None:
    match entry.get("calibration"):
        case {
            "agreement": {"compares": str(what), "mean": mean, "images": int(images), **more},
            **record,
        } if (value := fraction(mean)) is not None:
            counts, random = more.get("counts", True) is True, record.get("random") is True
            kind = f"{what} (random)" if random else what  # is not compared with that on photos
            return Measured(number, kind, what, value, counts, images, random=random)
    return None


def fraction(value: object) -> float | None:
    """A finite number of a history, -1 to 1; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or abs(value) > 1 + ROUND_OFF:
        return None
    return max(-1.0, min(1.0, float(value)))
