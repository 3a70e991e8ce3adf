"""A tied model and its original side by side: which modules correspond."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tiedconv.calibration.activation_cache import Cache, Stream, advance, capture, take
from tiedconv.calibration.objectives import Outputs, chain, tapped
from tiedconv.calibration.probing import SIZES, Probe, probe
from tiedconv.calibration.sample_forms import ALIKE, Forms
from tiedconv.calibration.spans import Link, Span, find_spans, inside
from tiedconv.runtime.tie import state_of
from tiedconv.training.device import Placement


@dataclass(frozen=True)
class Side:
    """One of the two models, and how it calls its modules."""

    model: nn.Module
    probe: Probe
    placement: Placement

    def modules(self, span: Span) -> list[nn.Module]:
        """The units of a span."""
        return [self.model.get_submodule(name) for name in span.units]

    def outputs(self, span: Span) -> Outputs:
        """Runs the units of a span on what `stream` gives."""
        if span.from_images:
            return tapped(lambda tensors: self.model(tensors[0]), self.modules(span))
        if span.around:
            outer, call = self.model.get_submodule(span.around), self.probe.calls[span.around]
            return tapped(lambda tensors: call.run(outer, tensors), self.modules(span))
        calls = [self.probe.calls[name] for name in span.units]
        return chain(self.modules(span), calls, span.links)

    def stream(self, span: Span, images: Tensor, batch_size: int, cache: Cache) -> Stream:
        """What reaches a span, for all images."""
        if span.from_images:
            return Stream((images,))
        first = span.around or span.units[0]
        module, call = self.model.get_submodule(first), self.probe.calls[first]
        return capture(self.model, module, call, images, batch_size, self.placement, cache)

    def advance(
        self, stream: Stream, span: Span, entry: Link, batch_size: int, cache: Cache
    ) -> Stream:
        """The stream after a span, for the next one; the old one is spent."""
        links = [*(link for link in span.links if link is not None), entry]
        calls = [self.probe.calls[name] for name in span.units]
        return advance(stream, self.modules(span), calls, links, batch_size, self.placement, cache)


@dataclass(frozen=True)
class Pair:
    """A tied model, its original, and the spans in which they are compared."""

    student: Side
    teacher: Side
    spans: list[Span]

    @classmethod
    def probed(
        cls, student: nn.Module, teacher: nn.Module, images: Tensor, placement: Placement,
        forms: Forms = ALIKE,
    ) -> Pair:  # fmt: skip
        """Probes both; they are on their device and in evaluation mode.

        Raises:
            UserError: the teacher is not the original.
        """

        def forward(model: nn.Module, batch: Tensor) -> None:
            with placement.autocast():
                model(take(batch, torch.arange(len(batch)), placement))

        alike = images[forms.batches(torch.arange(len(images)), max(SIZES))[0]]
        ours, theirs = (Side(m, probe(m, alike, forward), placement) for m in (student, teacher))
        spans = find_spans(teacher, state_of(student).plan, theirs.probe)
        if forms.groups is not None:
            spans = [replace(span, entry=None, replayed=False) for span in spans]
        # A student that takes another way than its teacher is compared as a whole.
        needed = (
            name
            for span in spans
            if not span.from_images
            for name in ([span.around] if span.around else span.units)
        )
        if any(name not in ours.probe.calls for name in needed):
            spans = [Span(("",))]
        return cls(ours, theirs, spans)

    def parameters(self, names: Sequence[str]) -> list[nn.Parameter]:
        """What the student's units of these names read, and no module outside them does."""
        root = self.student.model
        units = [root.get_submodule(name) for name in names]
        inner = {id(m) for unit in units for m in unit.modules()}
        outside = {
            id(p) for m in root.modules() if id(m) not in inner for p in m.parameters(recurse=False)
        }
        found = [p for unit in units for p in unit.parameters() if id(p) not in outside]
        plan = state_of(root).plan
        for name in [*plan.weights, *plan.aliases]:
            expr = plan.weights.get(plan.aliases.get(name, name))
            if expr is not None and any(inside(name, unit) for unit in names):
                found += [root.get_parameter(ref) for ref in expr.refs]
        return [p for p in {id(p): p for p in found}.values() if p.is_floating_point()]
