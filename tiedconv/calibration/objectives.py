"""What is made small: the error of a span's outputs, or of the whole model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiedconv.calibration.activation_cache import Stream, placed, run_tapped
from tiedconv.calibration.augmentation import augmented, corner_copies, is_images
from tiedconv.calibration.output_metric import OutputMetric
from tiedconv.calibration.probing import Call
from tiedconv.calibration.sample_forms import Forms
from tiedconv.outputs import kind_of
from tiedconv.training.device import Placement

Outputs = Callable[[list[Tensor]], list[Tensor]]
"""From the per-image tensors of a batch to the outputs of a span's units."""


def chain(modules: Sequence[nn.Module], calls: Sequence[Call], links: Sequence[object]) -> Outputs:
    """Runs units that read one another's outputs."""

    def outputs(tensors: list[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for n, (module, call) in enumerate(zip(modules, calls, strict=True)):
            output = call.run(module, tensors)
            found.append(output.clone())  # the next unit may write into it
            if n < len(links):
                link = links[n]
                assert isinstance(link, tuple)
                tensors = [output if source < 0 else tensors[source] for source in link]
        return found

    return outputs


def tapped(run: Callable[[list[Tensor]], Any], modules: Sequence[nn.Module]) -> Outputs:
    """Runs a model, or a module that holds all units, as far as the last unit."""

    def outputs(tensors: list[Tensor]) -> list[Tensor]:
        return run_tapped(lambda: run(tensors), modules, stop=True)[0]

    return outputs


def weighted(outputs: Outputs, metrics: Sequence[OutputMetric | None]) -> Outputs:
    """The same outputs mapped by their output metrics, where there are any."""

    def through(tensors: list[Tensor]) -> list[Tensor]:
        return [
            output if metric is None else metric(output)
            for output, metric in zip(outputs(tensors), metrics, strict=True)
        ]

    return through


@dataclass
class SpanObjective:
    """The relative squared error of a span's outputs, summed over its units.

    Args:
        modules: the student's units.
        parameters: what is fitted.
        student: runs the student's units.
        teacher: runs the teacher's units.
        student_stream: what reaches the student's.
        teacher_stream: what reaches the teacher's.
        placement: of both.
        energies: of the teacher's outputs, see `energies_of`.
        forms: of the samples.
    """

    modules: Sequence[nn.Module]
    parameters: Sequence[nn.Parameter]
    student: Outputs
    teacher: Outputs
    student_stream: Stream
    teacher_stream: Stream
    placement: Placement
    energies: Sequence[float] = ()
    forms: Forms = field(default_factory=Forms)

    def loss(self, index: Tensor, draws: np.random.Generator) -> Tensor:
        """The sum over units of the mean error over these images, which are as they were cached."""
        del draws
        return self._error(index)

    def _error(self, index: Tensor) -> Tensor:
        with torch.no_grad(), self.placement.autocast():
            targets = self.teacher(self.teacher_stream.take(index, self.placement))
        with self.placement.autocast():
            outputs = self.student(self.student_stream.take(index, self.placement))
        ours, theirs = (self.forms.without_padding(part, index) for part in (outputs, targets))
        return torch.stack(relative_errors(ours, theirs, self.energies)).sum()

    def error(self, index: Tensor) -> float:
        """The same, as a number."""
        return float(self._error(index))

    def run(self, index: Tensor) -> None:
        """Runs the student's units."""
        with self.placement.autocast():
            self.student(self.student_stream.take(index, self.placement))

    @torch.no_grad()
    def measure_energies(self, batch_size: int) -> None:
        """Measures what errors are relative to, over all images."""

        def batches() -> Iterable[list[Tensor]]:
            count = len(self.teacher_stream.tensors[0])
            for index in self.forms.batches(torch.arange(count), batch_size):
                with self.placement.autocast():
                    found = self.teacher(self.teacher_stream.take(index, self.placement))
                yield self.forms.without_padding(found, index)

        self.energies = energies_of(batches())


@dataclass
class JointObjective:
    """The distance of the outputs, plus the mean error of all units in the loss.

    The loss is of augmented images, the error of images as they are and of shifted copies: that
    of a few images alone would be too noisy to choose a state by.

    Args:
        model: the student.
        parameters: what is fitted.
        units: the student's units.
        teacher: the teacher.
        teacher_units: the teacher's units.
        images: all images.
        placement: of both.
        energies: of the teacher's outputs; empty leaves the units out of the loss.
        forms: of the images.
        augment: whether the loss is of augmented images; samples that are no images stay as they
            are.
    """

    model: nn.Module
    parameters: Sequence[nn.Parameter]
    units: Sequence[nn.Module]
    teacher: nn.Module
    teacher_units: Sequence[nn.Module]
    images: Tensor
    placement: Placement
    energies: Sequence[float] = ()
    forms: Forms = field(default_factory=Forms)
    augment: bool = True

    @property
    def modules(self) -> Sequence[nn.Module]:
        """The whole model."""
        return [self.model]

    @property
    def augments(self) -> bool:
        """Whether to augment: the samples are images."""
        return self.augment and self.forms.table is None and is_images(self.images)

    def loss(self, index: Tensor, draws: np.random.Generator) -> Tensor:
        """The loss of these images, augmented."""
        taps = bool(self.energies)
        images = self.images[index]
        if self.augments:
            images = augmented(images, draws)
        with torch.no_grad():
            targets, expected = self._tapped(
                self.teacher, self.teacher_units if taps else (), images, index
            )
        outputs, found = self._tapped(self.model, self.units if taps else (), images, index)
        loss = kind_of(expected, self.model).distance(found, expected, self.model)
        if taps:
            loss = loss + torch.stack(relative_errors(outputs, targets, self.energies)).mean()
        return loss

    def error(self, index: Tensor) -> float:
        """The distance of the model's outputs on these images and on shifted copies of them."""
        images = self.images[index]
        copies = list(corner_copies(images)) if self.augments else [images]
        return sum(self._distance(copy, index) for copy in copies) / len(copies)

    def _distance(self, images: Tensor, index: Tensor) -> float:
        _, expected = self._tapped(self.teacher, (), images, index)
        _, found = self._tapped(self.model, (), images, index)
        return float(kind_of(expected, self.model).distance(found, expected, self.model))

    def run(self, index: Tensor) -> None:
        """Runs the student on these images as they are."""
        self._tapped(self.model, (), self.images[index], index)

    @torch.no_grad()
    def measure_energies(self, batch_size: int) -> None:
        """Measures what the units' errors are relative to, over all images."""

        parts = self.forms.batches(torch.arange(len(self.images)), batch_size)
        self.energies = energies_of(
            self._tapped(self.teacher, self.teacher_units, self.images[index], index)[0]
            for index in parts
        )

    def _tapped(
        self, model: nn.Module, units: Sequence[nn.Module], images: Tensor, index: Tensor
    ) -> tuple[list[Tensor], Any]:
        # A copy for each model, which may write into its input.
        batch = placed(images.clone(), self.placement)
        with self.placement.autocast():
            found, output = run_tapped(lambda: model(batch), units, stop=False)
        return self.forms.without_padding(found, index), output


def relative_errors(
    outputs: Sequence[Tensor], targets: Sequence[Tensor], energies: Sequence[float]
) -> list[Tensor]:
    """||output - target||^2 of a mean image over the energy, for each unit."""
    return [
        (output.float() - target.float()).square().sum() / (len(output) * energy)
        for output, target, energy in zip(outputs, targets, energies, strict=True)
    ]


def energies_of(batches: Iterable[Sequence[Tensor]]) -> list[float]:
    """For each unit, the mean over images of ||output - mean over images||^2.

    The mean is that of the outputs of one shape; an output that has a shape for itself has none.

    Args:
        batches: outputs of the units, (B, ...) each, batch after batch.
    """
    means: list[dict[torch.Size, _Mean]] = []
    squares: list[Tensor] = []
    count = 0
    for outputs in batches:
        exact = [_float64(output) for output in outputs]
        powers = [output.square().sum() for output in exact]
        squares = [a + b for a, b in zip(squares, powers, strict=True)] if squares else powers
        means = means or [{} for _ in exact]
        for of_shape, output in zip(means, exact, strict=True):
            of_shape.setdefault(output.shape[1:], _Mean()).add(output)
        count += len(outputs[0])
    found: list[float] = []
    for of_shape, square in zip(means, squares, strict=True):
        power = float(square) / count
        # One image alone is as far from its mean as can be said.
        known = [mean for mean in of_shape.values() if mean.count > 1 or len(of_shape) == 1]
        spread = power - sum(mean.count / count * mean.power for mean in known)
        # Outputs that are the same for all images would make any error infinite.
        found.append(max(spread, 1e-6 * power, 1e-30))
    return found


@dataclass
class _Mean:
    """The mean of outputs of one shape, over images."""

    count: int = 0
    total: Tensor | float = 0.0

    def add(self, outputs: Tensor) -> None:
        self.total = outputs.sum(0) if not self.count else self.total + outputs.sum(0)
        self.count += len(outputs)

    @property
    def power(self) -> float:
        """Its squared norm."""
        return float((torch.as_tensor(self.total) / self.count).square().sum())


def _float64(tensor: Tensor) -> Tensor:
    # Apple's GPU has no float64.
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
