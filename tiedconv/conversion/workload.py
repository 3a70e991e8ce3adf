"""An input that a model takes, and the multiply-adds of the model on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tiedconv.conversion.calibrate import Calibration
from tiedconv.conversion.sample_inputs import named_inputs
from tiedconv.conversion.symmetry_proof import first_image
from tiedconv.core.workload import Workload
from tiedconv.runtime.call_hooks import LONGEST, random_text, takes_text_too
from tiedconv.runtime.example_inputs import (
    Arguments,
    Example,
    as_arguments,
    on_device_of,
    usual_inputs,
)
from tiedconv.runtime.forward_check import further_inputs, takes_text
from tiedconv.runtime.macs import measure
from tiedconv.sources import Source


@dataclass(frozen=True)
class Counted:
    """What one forward pass of a model takes, and the input that it was counted on.

    Args:
        workload: in multiply-adds.
        arguments: of the model; its tensors may be on the meta device, as the model is.
    """

    workload: Workload
    arguments: Arguments


def count_macs(
    model: nn.Module,
    source: Source | None = None,
    example: Example | None = None,
    calib: Calibration | None = None,
) -> Workload | None:
    """The workload of a plain model, see `counted`."""
    found = counted(model, source, example, calib)
    return None if found is None else found.workload


def counted(
    model: nn.Module,
    source: Source | None = None,
    example: Example | None = None,
    calib: Calibration | None = None,
) -> Counted | None:
    """The workload of a plain model on one input.

    The input is the first that the model takes of: the example, a calibration's first sample, what
    an export is traced with (an image of the size that the model's preprocessing names, a text
    as long as the model takes, or both), images of the sizes that the model names, tokens, indices.
    Only its shape counts, unless what the model runs depends on values.

    Args:
        model: its parameters may be on the meta device.
        source: where it came from, which tells how its images are prepared.
        example: an input of the model.
        calib: what it is calibrated on.

    Returns:
        None if it takes none of them.
    """
    for given in _inputs(model, source, example, calib):
        arguments = as_arguments(on_device_of(model, _with_text(model, given)))
        try:
            found = measure(model, *arguments)
        except Exception:  # models reject inputs with any error
            continue
        if found.total:
            return Counted(found, arguments)
    return None


def _with_text(model: nn.Module, given: Example) -> Example:
    """An input, with a text beside images alone where the model takes both."""
    if isinstance(given, Tensor) and given.ndim == 4 and takes_text_too(model):
        image = torch.zeros(given.shape) if given.is_meta else given
        return {"pixel_values": given, **further_inputs(model, image)}
    return given


def _inputs(
    model: nn.Module, source: Source | None, example: Example | None, calib: Calibration | None
) -> Iterator[Example]:
    if example is not None:
        yield example
    if calib is not None and (sample := _sample(model, calib)) is not None:
        yield sample
    if takes_text(model) and not takes_text_too(model):
        yield random_text(model, torch.zeros(1, 1, 1, 1), LONGEST)
    prepared = None if source is None else source.preprocess
    if prepared is not None:
        yield torch.zeros(1, prepared.channel_count(), prepared.size, prepared.size)
    kinds: Iterable[Iterator[Example]] = usual_inputs(model)
    yield from itertools.chain.from_iterable(kinds)


def _sample(model: nn.Module, calib: Calibration) -> Example | None:
    """The first sample of a data set, as a batch of one; a folder's have the usual size."""
    data: Any = calib.data.dataset if isinstance(calib.data, DataLoader) else calib.data
    if not hasattr(data, "__getitem__") or isinstance(data, str) or not len(data):
        return None
    first = data[0]
    if isinstance(first, Mapping):
        return {
            name: torch.as_tensor(first[name]).unsqueeze(0) for name in named_inputs(model, first)
        }
    return first_image(data)
