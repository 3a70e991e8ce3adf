"""How the samples of a calibration reach a model: one tensor each, whatever the model takes.

| samples | model | what it is called with |
|---|---|---|
| images | takes images | the images |
| images that differ in size | takes any size | the images, by their numbers |
| images | takes token ids and images, as CLIP does | the images, and random text |
| dicts of tensors | takes named inputs | the rows of the dicts, by their numbers |
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tiedconv.conversion.calibrate import Calibration, DrawnText
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.data import ImageList
from tiedconv.data.grouping import numbered
from tiedconv.data.seeds import sample_seeds
from tiedconv.errors import DataError, UserError, first_line
from tiedconv.io.run_state import tensor_digest
from tiedconv.runtime.call_hooks import (
    After,
    Before,
    ChosenOutput,
    RandomText,
    hooked,
    one_seed,
    same_random_numbers,
    takes_text_too,
)
from tiedconv.runtime.example_inputs import evaluation
from tiedconv.runtime.native_size import native_size
from tiedconv.runtime.sample_table import IMAGE, Rows, SampleTable
from tiedconv.sources import Source

LABELS = ("label", "labels")
"""Entries of a sample that are answers; a calibration looks at none."""

TRIED = 4
"""Shapes of samples, at most, that a model is tried on before anything is measured."""


@contextmanager
def calibration_samples(
    model: nn.Module, calib: Calibration, source: Source
) -> Iterator[Dataset[Any]]:
    """The samples as one tensor each; within the context the model can be called with them.

    So can copies that are made of it meanwhile. Samples of several shapes come with `groups`, by
    which `data.Loader` makes batches of one shape.

    Args:
        model: plain.
        calib: what to calibrate by.
        source: says how images are prepared.

    Raises:
        DataError: a folder without images; samples that differ in shape, some of which the model
            does not take (`samples-differ`).
        UserError: the model takes none of the entries of a sample (`inputs-unknown`).
    """
    data = calib.open(source, native_size(model))
    before: list[Before] = []
    after: list[After] = []
    entries = _entries_of(model, data)
    of_images = entries is None
    if entries is None:
        entries = _images_by_size(data, calib.config.seed)
    table = None if entries is None else SampleTable(entries)
    if table is not None:
        before.append(table)
        data = _Numbers(table)
    if of_images and takes_text_too(model):
        before.append(RandomText())
        calib.on_event(DrawnText())
    if calib.output is not None:
        after.append(ChosenOutput(calib.output))
    with ExitStack() as stack:
        stack.enter_context(hooked(model, before, after))
        if table is not None and isinstance(data, _Numbers) and data.groups is not None:
            _try_shapes(model, table, data)
        if _draws_random_numbers(model, data):
            stack.enter_context(same_random_numbers(model))
        yield data


class _Numbers(Dataset[Any]):
    """The numbers of samples, in place of the samples.

    Attributes:
        groups: a number for each sample, the same for those of one shape; None if all have one.
    """

    in_memory = True

    def __init__(self, table: SampleTable) -> None:
        self._table = table
        self.groups = numbered([tuple(table.shapes(i).items()) for i in range(len(table))])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index]), 0

    def digest(self) -> str:
        """Of the samples that the numbers stand for."""
        found = hashlib.sha256()
        for name, rows in self._table.table.items():
            found.update(name.encode())
            for tensor in [rows] if isinstance(rows, Tensor) else rows:
                found.update(tensor_digest(tensor).encode())
        return found.hexdigest()


def _entries_of(model: nn.Module, data: Dataset[Any]) -> dict[str, Rows] | None:
    """The entries of dicts that the model takes; None if samples are no dicts.

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
    return {n: _together([t for t in rows if t is not None]) for n, rows in tensors.items()}


def _images_by_size(data: Dataset[Any], seed: int) -> dict[str, Rows] | None:
    """The images of a data set whose images differ in shape, else None.

    All are read once to find out; they are kept in memory only if they differ. Folders and tensors
    have images of one size.

    Args:
        data: gives images, or pairs of an image and something.
        seed: of what is random in reading an image, as a `Loader` has it.
    """
    if isinstance(data, ImageList) or hasattr(data, "read_batch") or not len(data):  # type: ignore[arg-type]
        return None
    shapes = set()
    for image in _images(data, seed):
        if image is None:
            return None  # the loader says what is wrong
        shapes.add(image.shape)
    if len(shapes) < 2:
        return None
    return {IMAGE: [image for image in _images(data, seed) if image is not None]}


def _images(data: Dataset[Any], seed: int) -> Iterator[Tensor | None]:
    count = len(data)  # type: ignore[arg-type]
    for index, each in enumerate(sample_seeds(seed, 0, count).tolist()):
        with one_seed(None, each):
            sample = data[index]
        image = sample[0] if isinstance(sample, tuple | list) and sample else sample
        yield image if isinstance(image, Tensor) else None


def _together(rows: list[Tensor]) -> Rows:
    """One tensor, or the list where shapes differ."""
    return rows if len({row.shape for row in rows}) > 1 else torch.stack(rows)


def _try_shapes(model: nn.Module, table: SampleTable, data: _Numbers) -> None:
    """Run a model on samples of some of the shapes.

    Raises:
        DataError: it takes some of them only (`samples-differ`).
        UserError: it takes none (`images-rejected`).
    """
    assert data.groups is not None
    first = {int(group): i for i, group in reversed([*enumerate(data.groups)])}
    by_size = sorted(first.values(), key=lambda i: sum(map(_numel, table.shapes(i).values())))
    tried = {i: _error(model, i) for i in [*by_size[:2], *by_size[2:][-(TRIED - 2) :]]}
    refused = {i: error for i, error in tried.items() if error is not None}
    if not refused:
        return
    number, error = next(iter(refused.items()))
    reason = f"{type(error).__name__}: {first_line(error)}"
    if len(refused) == len(tried):
        raise UserError(
            f"{type(model).__name__} can't be run on a sample ({reason})",
            "Nothing can be computed",
            "Give samples as the model wants them, without a batch dimension",
            code="images-rejected",
        ) from error
    taken = next(i for i in tried if i not in refused)
    raise DataError(
        f"Samples differ in shape, {_said(table, taken)} and {_said(table, number)}, and "
        f"{type(model).__name__} does not take the second ({reason})",
        "It can't be calibrated on all of them",
        "Resize or crop images to one size, pad token ids to one length (with an attention_mask), "
        "or build the model so that it takes any size (timm: dynamic_img_size=True)",
        code="samples-differ",
    ) from error


def _error(model: nn.Module, number: int) -> Exception | None:
    first = next(model.parameters(), None)
    device = None if first is None else first.device
    try:
        with evaluation(model):
            model(torch.tensor([[number]], device=device))
    except Exception as error:  # models reject inputs with any error
        return error
    return None


def _said(table: SampleTable, number: int) -> str:
    return " ".join(f"{name} {shape}".strip() for name, shape in table.shapes(number).items())


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


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
