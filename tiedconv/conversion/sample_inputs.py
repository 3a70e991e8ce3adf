"""How the samples of a calibration reach a model: one tensor each, whatever the model takes.

| samples | model | what it is called with |
|---|---|---|
| images | takes images | the images |
| images | takes token ids and images, as CLIP does | the images, and random text |
| dicts of tensors | takes named inputs | the rows of the dicts, by their numbers |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.conversion.calibrate import Calibration, DrawnText
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.errors import DataError, UserError
from tiedconv.runtime.call_hooks import (
    After,
    Before,
    ChosenOutput,
    NamedInputs,
    RandomText,
    hooked,
    same_random_numbers,
    takes_text_too,
)
from tiedconv.runtime.example_inputs import evaluation
from tiedconv.runtime.native_size import native_size
from tiedconv.sources import Source

LABELS = ("label", "labels")
"""Entries of a sample that are answers; a calibration looks at none."""


@contextmanager
def calibration_samples(
    model: nn.Module, calib: Calibration, source: Source
) -> Iterator[Dataset[Any]]:
    """The samples as one tensor each; within the context the model can be called with them.

    So can copies that are made of it meanwhile.

    Args:
        model: plain.
        calib: what to calibrate by.
        source: says how images are prepared.

    Raises:
        DataError: a folder without images; samples that do not go together (`samples-differ`).
        UserError: the model takes none of the entries of a sample (`inputs-unknown`).
    """
    data = calib.open(source, native_size(model))
    before: list[Before] = []
    after: list[After] = []
    table = _table_of(model, data)
    if table is not None:
        before.append(NamedInputs(table))
        data = _Rows(len(next(iter(table.values()))))
    elif takes_text_too(model):
        before.append(RandomText())
        calib.on_event(DrawnText())
    if calib.output is not None:
        after.append(ChosenOutput(calib.output))
    with ExitStack() as stack:
        stack.enter_context(hooked(model, before, after))
        if _draws_random_numbers(model, data):
            stack.enter_context(same_random_numbers(model))
        yield data


class _Rows(Dataset[Any]):
    """The numbers of samples, in place of the samples."""

    in_memory = True

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index]), 0


def _table_of(model: nn.Module, data: Dataset[Any]) -> dict[str, Tensor] | None:
    """The entries of dicts that the model takes, `(samples, ...)` each; None if they are no dicts.

    Raises:
        DataError, UserError: see `calibration_samples`.
    """
    sized: Any = data
    if not len(sized) or not isinstance(sized[0], Mapping):
        return None
    samples = [sized[i] for i in range(len(sized))]
    names = named_inputs(model, samples[0])
    tensors = {name: [_tensor(sample.get(name)) for sample in samples] for name in names}
    if not names or any(t is None for rows in tensors.values() for t in rows):
        raise UserError(
            f"A sample holds {', '.join(map(str, samples[0])) or 'nothing'}, and "
            f"{type(model).__name__} takes {', '.join(_parameters(model))}",
            "The model can't be run on the samples",
            "Give dicts whose keys are arguments of the model and whose values are tensors, "
            "without a batch dimension",
            code="inputs-unknown",
        )
    try:
        return {name: torch.stack([t for t in rows if t is not None])
                for name, rows in tensors.items()}  # fmt: skip
    except RuntimeError as error:
        shapes = {name: sorted({tuple(t.shape) for t in rows if t is not None})
                  for name, rows in tensors.items()}  # fmt: skip
        name, found = next((n, s) for n, s in shapes.items() if len(s) > 1)
        raise DataError(
            f"Samples differ in shape: {name} is {found[0]} and {found[1]}",
            "They can't be run together",
            "Pad token ids to one length (with an attention_mask), and give images of one size",
            code="samples-differ",
        ) from error


def named_inputs(model: nn.Module, sample: Mapping[str, Any]) -> list[str]:
    """The entries of a sample that are arguments of the model."""
    return [name for name in sample if name not in LABELS and _is_taken(model, name)]


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters


def _is_taken(model: nn.Module, name: str) -> bool:
    """Whether an entry is an argument. Further ones count only where a model names none at all."""
    found = _parameters(model)
    return name in found or all(p.kind is p.VAR_KEYWORD for p in found.values())


def _draws_random_numbers(model: nn.Module, data: Dataset[Any]) -> bool:
    """Whether a model draws random numbers in evaluation, as masked pretraining does."""
    sample = first_image(data)
    first = next(model.parameters(), None)
    if sample is None or first is None:
        return False
    with evaluation(model):
        state = torch.get_rng_state()
        try:
            model(sample.to(first.device))
        except Exception:  # the calibration raises it, and says why
            return False
        return not torch.equal(state, torch.get_rng_state())
